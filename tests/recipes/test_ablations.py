"""Ablations: every change is the row with one thing changed, at one point, beside the row's own scores."""

import pytest

from hf_lowrank.methods.resolve import Config
from recipes.studies import ablations
from recipes.studies.compare_methods import Record
from recipes.studies.compare_rows import Point
from recipes.studies.compare_tables import losses, paired, text
from recipes.studies.compare_training import TUNING_SEED, Run, declared_bytes, options


BEST, OTHER = Point(1, 0, -1, 1), Point(1, 1, -1, 1)
MUON, ADAMW = ablations.BASES["muon_4bit"], ablations.BASES["full_adamw"]
SPARED = ablations.changes_of(MUON)[-1]


def result(score):
    return {"score_loss": score, "tune_loss": 3.0, "matrix_bytes": 0.5}


@pytest.fixture
def recorded(tmp_path):
    """The row's search, which ended at BEST, and its scores."""
    record = Record(tmp_path / "methods.jsonl")
    for point, tuned in ((OTHER, 4.0), (BEST, 3.0)):
        run = Run(MUON, point, "tiny", 4, TUNING_SEED)
        record.append(run, {**result(None), "tune_loss": tuned})
    for seed, score in ((2, 1.0), (3, 1.5)):
        record.append(Run(MUON, BEST, "tiny", 4, seed), result(score))
    return record


@pytest.mark.parametrize("change", ablations.CHANGES, ids=lambda change: change.says)
def test_a_change_changes_one_thing_and_the_last_all_that_can_be_spared(change):
    base, row = change.base, change.row
    assert (row.method, row.unit, row.fixed) == (base.method, base.unit, base.fixed)
    before, after = (Config.of(base.method, options(one, "tiny"), model=True).options for one in (base, row))
    differing = {key for key in before if before[key] != after[key]} | (after.keys() ^ before.keys())
    where = BEST._replace(betas=-1 if base == MUON else 1)  # as recorded
    best, point = where.values(base), change.point(where).values(row)
    moved = [best[key] != point[key] for key in best]
    assert len(differing) + sum(moved) == (3 if change is SPARED else 1)
    if change.betas:
        apart = [one != other for one, other in zip(change.betas, best["betas"], strict=True)]
        assert tuple(point["betas"]) == change.betas and sum(apart) == 1
    assert differing == set(change.options)


def test_what_is_missing_is_run_at_the_point_on_the_seeds_of_the_score(tmp_path):
    row, point = ablations.changes_of(MUON)[0].row, BEST
    study = ablations.Changed((row,), "tiny", 4, 1, 1, 3, points={row.name: point})
    record = Record(tmp_path / "ablations.jsonl")
    record.append(Run(row, point, "tiny", 4, 3), result(1.0))
    record.append(Run(row, OTHER, "tiny", 4, 2), result(1.0))  # at another point
    assert [(run.point, run.seed) for run in study.wanted(row, record)] == [(point, 2), (point, 4)]


def test_differences_are_paired_by_seed_with_the_row_as_it_is(recorded):
    changed = {"one": {2: result(1.25), 3: result(1.75), 4: result(9.0)}, "two": {3: result(None)}, "three": {}}
    lines = ablations.table(MUON.name, recorded.scores(MUON, "tiny", 4), changed).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert cells["as it is"][2:4] == ["-", "2"]
    assert cells["one"][2:4] == ["+0.250 ± 0.000", "2"]  # seed 4 has no pair
    assert cells["two"][1:3] == ["diverged", "diverged"]
    assert set(cells["three"]) == {"-"}


@pytest.mark.parametrize("base", ablations.BASES.values(), ids=lambda base: base.name)
def test_the_page_has_the_table_of_the_recorded_runs(base):
    page = (ablations.FILE.parents[2] / "docs" / "recommended.md").read_text()
    recorded, record = Record(ablations.METHODS_FILE), Record(ablations.FILE)
    best = recorded.best(base, "small", 1000)
    changed = {c.says: record.at(c.point(best), c.row, "small", 1000) for c in ablations.changes_of(base)}
    assert all(len(runs) == 5 for runs in changed.values())
    assert ablations.table(base.name, recorded.scores(base, "small", 1000), changed) in page


@pytest.mark.parametrize("size, steps", [("narrow", 5152), ("large", 1200)])
def test_the_page_has_what_is_spared_at_other_sizes(size, steps):
    page = (ablations.FILE.parents[2] / "docs" / "recommended.md").read_text()
    recorded, record, spared = Record(ablations.METHODS_FILE), Record(ablations.FILE), SPARED
    runs = record.at(spared.point(recorded.best(MUON, size, steps)), spared.row, size, steps)
    difference = paired(losses(runs), losses(recorded.scores(MUON, size, steps)))
    assert len(runs) == 5
    assert text(difference, sign="+") in page.partition("### What each part is worth")[2].partition("###")[0]


def test_the_command_names_what_has_to_be_run_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ablations.py", "--base", str(tmp_path / "none.jsonl"), "--print"])
    with pytest.raises(SystemExit):
        ablations.main()
    assert "has no search of muon_4bit at small, 1000 steps" in capsys.readouterr().err


def test_the_changed_momentum_is_held_in_the_bits_that_its_name_says():
    expected = {"momentum in 8 bits": (1.0, 1.1), "momentum in fp32": (4.0, 4.1)}
    for change in ablations.changes_of(MUON):
        low, high = expected.get(change.says, (0.5, 0.6))  # and what a block or a row has for itself
        assert low <= declared_bytes(change.row, "small") <= high, change.says


def test_chosen_changes_alone_are_in_the_table(recorded, tmp_path, monkeypatch, capsys):
    files = ["--base", str(tmp_path / "methods.jsonl"), "--file", str(tmp_path / "ablations.jsonl")]
    chosen = ["--changes", "three iterations", "no weight decay"]
    monkeypatch.setattr("sys.argv", ["ablations.py", "--size", "tiny", "--steps", "4", "--print", *files, *chosen])
    ablations.main()
    shown = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert shown == ["as it is", *chosen[1:]]
