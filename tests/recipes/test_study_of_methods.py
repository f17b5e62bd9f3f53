"""The study of methods: one rule of search for every row, runs that are recorded once, texts that are kept apart."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import Future
from dataclasses import replace
from itertools import product
from math import inf, sqrt
from pathlib import Path
from statistics import mean

import pytest
import torch
from scipy.stats import ttest_1samp
from transformers import LlamaForCausalLM

from recipes.studies import compare_methods as study
from recipes.studies import compare_picture as picture
from recipes.studies import compare_tables as tables
from recipes.studies import compare_training as training
from recipes.studies.compare_rows import BASELINE, ROWS, START, Point, next_trial, settled


@pytest.fixture
def text(monkeypatch, paragraphs, tokenizer):
    """A few paragraphs in the place of the speeches."""
    blocks = training.Blocks.pack(paragraphs, tokenizer, 16)
    parts = [training.Blocks(blocks.rows[i::3][:64]) for i in range(3)]
    found = training.Text(tokenizer, *parts)
    for module in (study, training):
        monkeypatch.setattr(module, "read", lambda: found)
    monkeypatch.setattr(training, "BLOCK", 16)
    return found


def search(loss, row, *, trials, most):
    tried = {}
    while (point := next_trial(tried, row, start=Point(), trials=trials, most=most)) is not None:
        assert point not in tried
        tried[point] = loss(point)
    return tried


def bowl(*bottom):
    return lambda point: sum((x - y) ** 2 for x, y in zip(point, bottom, strict=True))


@pytest.mark.parametrize("bottom", [*product((-3, 0, 2), (-1, 2), (-1, 1), (0, 2))])
def test_the_search_finds_the_bottom_of_a_bowl_beyond_every_edge(bottom):
    tried = search(bowl(*bottom), ROWS[BASELINE], trials=12, most=100)
    assert min(tried, key=tried.get) == bottom
    assert settled(tried, ROWS[BASELINE])


@pytest.mark.parametrize("name", ["full_adamw", "muon_4bit", "scale_sgd", "lora"])
def test_every_row_has_the_same_number_of_trials_and_more_only_while_its_best_is_at_an_edge(name):
    row = ROWS[name]
    settled_early = search(bowl(0, 0, 0, 0), row, trials=12, most=20)
    assert len(settled_early) == 12
    endless = search(lambda point: -point.matrices, row, trials=12, most=20)
    assert len(endless) == 20 and not settled(endless, row)
    more = search(bowl(4, 0, 0, 0), row, trials=6, most=50)
    assert 6 < len(more) < 50 and settled(more, row)
    assert all(abs(p.betas) <= len(row.betas) // 2 and p.decay >= 0 for p in {*settled_early, *endless, *more})


def test_a_search_that_began_elsewhere_and_is_over_begins_no_more():
    tried = {Point(3, i): 1.0 for i in range(5)}
    assert next_trial(tried, ROWS[BASELINE], start=Point(), trials=3, most=5) is None
    assert next_trial(tried, ROWS[BASELINE], start=Point(), trials=3, most=6) == Point()


def test_a_search_in_which_all_diverged_goes_on_by_the_same_rule():
    tried = search(lambda point: inf, ROWS[BASELINE], trials=5, most=5)
    assert len(tried) == 5


def run_of(name, seed=2, steps=2):
    return training.Run(ROWS[name], Point(), "tiny", steps, seed)


def test_all_rows_have_the_same_embeddings_head_and_norms(text):
    """With the same first gradient, they are bit for bit the same after a step, and so are their bytes of state."""
    dense = {}
    for name in ROWS.keys() - {"lora"}:  # its gradient's norm, by which all is clipped, is another
        torch.manual_seed(0)
        model = LlamaForCausalLM(training.llama_config(training.SIZES["tiny"], text.tokenizer, training.BLOCK))
        optimizer, matrices = training.optimizer_of(run_of(name), model)
        training.fit_(model, optimizer, run_of(name, steps=1), text.training)
        kept = {id(p) for p in matrices}
        assert len(kept) == 7
        others = [p for p in model.parameters() if id(p) not in kept]
        dense[name] = torch.cat([p.detach().flatten() for p in others])
        assert {p.dtype for q in others for p in optimizer.state[q].values()} <= {torch.float32, torch.int64}, name
    assert all(torch.equal(weights, dense[BASELINE]) for weights in dense.values())


@pytest.mark.parametrize("name", ROWS)
def test_recorded_bytes_are_the_declared_ones_and_the_rank_at_a_budget_is_the_largest_that_fits(text, name):
    row = ROWS[name]
    found = training.train(run_of(name), text)
    declared = training.declared_bytes(row, "tiny")
    assert found["matrix_bytes"] == declared
    fitting = training.at_bytes(row, "tiny", declared)
    assert training.declared_bytes(fitting, "tiny") == declared
    assert training.at_bytes(row, "tiny", 1e-3) is None
    if row.ranked:
        assert fitting.options["rank"] == 4
        assert training.at_bytes(row, "tiny", declared - 1e-6).options["rank"] == 3
    else:
        assert fitting == row


class Unreadable(training.Blocks):
    def __init__(self):
        pass

    @property
    def rows(self):
        raise AssertionError("the text of the score was read")


def test_tuning_sees_no_text_of_the_score(text):
    blind = text._replace(scoring=Unreadable())
    found = training.train(run_of(BASELINE, seed=training.TUNING_SEED), blind)
    assert "score_loss" not in found and found["tune_loss"] > 0
    with pytest.raises(AssertionError, match="was read"):
        training.train(run_of(BASELINE), blind)


def test_the_three_texts_are_of_different_speeches(monkeypatch):
    marks = [f" mark{i} " * 400 for i in range(6)]
    monkeypatch.setattr(training, "speeches", lambda: (marks[:2], marks[2:]))
    found = training.read.__wrapped__()
    said = [{*found.tokenizer.decode(blocks.rows.flatten()).split()} - {""} for blocks in found[1:]]
    whole = [{word for word in words if word in {mark.split()[0] for mark in marks}} for words in said]
    assert whole == [{"mark0", "mark1"}, {"mark2", "mark4"}, {"mark3", "mark5"}]


def small(*names, **more):
    values = {"size": "tiny", "steps": 2, "trials": 3, "most": 4, "seeds": 2}
    return study.Study(tuple(ROWS[name] for name in names), **{**values, **more})


SAME = ("row", "point", "seed", "tune_loss", "score_loss", "train_loss", "matrix_bytes", "refreshes")


def test_a_study_goes_on_where_it_stopped_and_gives_the_same(text, tmp_path):
    file, asked = tmp_path / "runs.jsonl", small("galore_dominant_adamw", "fira_i3s_adamw")
    study.alone(asked, study.Record(file))
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:50])  # killed while it wrote
    record = study.Record(file)
    assert len(record.runs) == 3
    study.alone(asked, record)
    before, after = (
        [{k: json.loads(x).get(k) for k in SAME} for x in y] for y in (lines, file.read_text().splitlines())
    )
    assert before == after
    study.alone(asked, record)
    assert len(record.runs) == len(lines)
    assert study.Record(file).runs == record.runs


def test_scores_are_at_the_best_point_of_the_tuning_text_and_of_other_seeds(text, tmp_path):
    record, row = study.Record(tmp_path / "runs.jsonl"), ROWS["muon_4bit"]
    study.alone(small(row.name), record)
    trials, scores = record.trials(row, "tiny", 2), record.scores(row, "tiny", 2)
    assert 3 <= len(trials) <= 4 and set(scores) == {2, 3}
    assert record.best(row, "tiny", 2) == min(trials, key=trials.get)
    record.append(training.Run(row, Point(others=9), "tiny", 2, 4), {"tune_loss": 0.0, "score_loss": 0.0})
    assert set(record.scores(row, "tiny", 2)) == {2, 3}
    started = small(row.name, steps=1, trials=1, most=1, start_from=("tiny", 2)).wanted(row, record)
    assert [run.point for run in started] == [record.best(row, "tiny", 2)]


def test_a_row_at_equal_bytes_starts_where_the_row_that_it_was_made_from_ended(text, tmp_path):
    record, row = study.Record(tmp_path / "runs.jsonl"), ROWS["fira_adamw"]
    best = Point(1, 2, 1, 0)
    record.append(training.Run(row, best, "tiny", 2, training.TUNING_SEED), {"tune_loss": 1.0})
    made = training.at_bytes(row, "tiny", 1.0)
    asked = study.Study((made,), "tiny", 2, 3, 4, 2, start_from=("tiny", 2))
    assert made.name != row.name and [run.point for run in asked.wanted(made, record)] == [best]
    own = ROWS["full_adamw_8bit"].own
    record.append(training.Run(ROWS["full_adamw_8bit"], best, "tiny", 2, training.TUNING_SEED), {"tune_loss": 1.0})
    assert asked.start(own, record) == best


def test_runs_at_points_that_meant_something_else_are_not_this_rows(tmp_path):
    record, row = study.Record(tmp_path / "runs.jsonl"), ROWS["full_muon"]
    record.append(training.Run(row, Point(), "tiny", 2, training.TUNING_SEED), {"tune_loss": 1.0})
    assert record.best(row, "tiny", 2) == Point()
    assert record.best(replace(row, betas=((0.5, 0.5), (0.6, 0.6), (0.7, 0.7))), "tiny", 2) is None
    assert record.runs[0]["commit"]


def test_a_run_that_fails_takes_no_other_with_it(tmp_path, monkeypatch, capsys):
    """Its row is left out, the others are trained and recorded, and in the end it is said."""

    class Pool:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, _, run):
            future = Future()
            if run.row.name == "racs":
                future.set_exception(ValueError("svd did not converge"))
            else:
                future.set_result({"tune_loss": 1.0, "score_loss": 1.0, "seconds": 0.0})
            return future

    monkeypatch.setattr(study, "ProcessPoolExecutor", Pool)
    record = study.Record(tmp_path / "runs.jsonl")
    with pytest.raises(RuntimeError, match="errors, printed above, in racs"):
        study.several(small("racs", "galore_dominant_adamw"), record, inf, jobs=2)
    assert {run["row"] for run in record.runs} == {"galore_dominant_adamw"} and len(record.runs) == 6
    assert "svd did not converge" in capsys.readouterr().err


def test_a_second_study_is_refused(tmp_path, capsys):
    file = tmp_path / "runs.jsonl"
    with study.only_one(file), pytest.raises(SystemExit), study.only_one(file):
        pass
    assert "another study writes to" in capsys.readouterr().err
    with study.only_one(file):
        pass


def test_a_run_that_diverges_is_recorded_and_is_nobodys_best(text, tmp_path):
    record, row = study.Record(tmp_path / "runs.jsonl"), ROWS["scale_sgd"]
    wild = training.Run(row, Point(matrices=90), "tiny", 3, training.TUNING_SEED)
    tame = training.Run(row, Point(), "tiny", 3, training.TUNING_SEED)
    for run in (wild, tame):
        record.append(run, training.train(run, text))
    assert [run["tune_loss"] is None for run in record.runs] == [True, False]
    assert record.best(row, "tiny", 3) == Point()


def test_intervals_are_those_of_a_hand_computation(tmp_path):
    t = 2.776445  # of Student's table, 97.5 %, 4 degrees of freedom
    middle, half = tables.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert middle == 3 and half == pytest.approx(t * sqrt(2.5) / sqrt(5), rel=1e-6)  # the table has 7 digits
    ours, baseline = [3.50, 3.61, 3.47, 3.55, 3.58], [3.60, 3.70, 3.60, 3.66, 3.65]
    differences = [-0.10, -0.09, -0.13, -0.11, -0.07]  # mean -0.1, squares about it sum to 0.002
    record = study.Record(tmp_path / "runs.jsonl")
    for name, losses in (("full_adamw", baseline), ("racs", ours)):
        record.append(run_of(name, 1), {"tune_loss": 3.0})
        for seed, loss in enumerate(losses, start=2):
            rest = {"matrix_bytes": 1.0, "state_bytes": 2**20, "refreshes": 7, "parameters": 3072}
            record.append(run_of(name, seed), {"tune_loss": 3.0, "score_loss": loss, **rest})
    best, worst = tables.results(record, [ROWS[BASELINE], ROWS["racs"]], "tiny", 2)
    assert (best.row.name, worst.row.name) == ("racs", "full_adamw")
    assert tables.paired(best.losses, worst.losses) == pytest.approx((mean(differences), t * sqrt(5e-4 / 5)), rel=1e-6)
    cells = tables.line(best, worst, stands=True)
    assert cells[:7] == ["racs", "1.00", "1.00", "3.542 ± 0.071", "-0.100 ± 0.028", "yes", "5"]
    assert cells[8] == "1, at an edge"
    assert "minus racs" in tables.table([best, worst], best)
    assert tables.line(worst, best, stands=False)[4:6] == ["+0.100 ± 0.028", "-"]
    assert tables.line(best, best, stands=False)[4] == "-"
    series = picture.series(record, "tiny", 2)
    assert series.differences == {"racs": tables.paired(best.losses, worst.losses), "full_adamw": (0.0, 0.0)}
    assert series.name.endswith(" 0.7 tokens for each")
    left, right = picture.drawn([series]).axes
    (points, _, (bars,)) = left.containers[0]
    assert [*points.get_xdata()] == pytest.approx([-0.1, 0.0])
    ends = [segment[:, 0] for segment in bars.get_segments()]
    assert ends[0] == pytest.approx([-0.1 - 0.02776, -0.1 + 0.02776], abs=1e-5)
    assert [bar.get_width() for bar in right.patches] == [1.0, 1.0]
    assert [label.get_text() for label in left.get_yticklabels()] == ["racs", "full_adamw"]
    picture.draw([series], tmp_path / "picture.png")
    assert picture.drawn_in(tmp_path / "picture.png") == picture.described([series])
    assert tables.paired({2: inf, 3: 1.0}, {2: 1.0, 3: 1.0}) == (inf, inf)
    assert tables.paired({2: 1.0}, {3: 1.0}) is None


def test_chances_are_those_of_a_paired_t_test_and_corrected_by_holm():
    """By scipy's own test; Holm's own example would need a table, so by its definition on four values."""
    differences = [0.02, 0.05, -0.01, 0.04, 0.03]
    second = dict(enumerate([3.0, 3.25, 2.5, 4.0, 3.5]))
    first = {seed: loss + difference for (seed, loss), difference in zip(second.items(), differences, strict=True)}
    expected = ttest_1samp(differences, 0.0).pvalue
    assert tables.chance({**first, 7: 0.0}, second) == pytest.approx(expected, rel=1e-9)
    assert tables.chance({}, second) == tables.chance({0: 3.1}, second) == tables.chance(second, second) == 1
    assert tables.chance({**first, 0: inf}, second) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, that there is no spread
        assert tables.chance({seed: loss + 0.125 for seed, loss in second.items()}, second) == 0
    assert tables.corrected([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])


def test_a_difference_stands_where_all_of_a_table_are_right_together():
    """Two that each are told from zero by themselves, one of them among nine that are not."""
    baseline = {seed: 3.0 + seed / 8 for seed in range(2, 7)}

    def result(name, differences):
        runs = {seed: {"score_loss": baseline[seed] + d} for seed, d in zip(baseline, differences, strict=True)}
        return tables.Result(replace(ROWS[BASELINE], name=name), Point(), 1, True, runs)

    same, sure = result(BASELINE, [0.0] * 5), result("sure", [-0.10, -0.09, -0.11, -0.10, -0.08])
    thin = result("thin", [-0.01, -0.06, -0.02, -0.07, -0.03])  # p = 0.03
    rest = [result(f"rest {i}", [0.01 * (i + 1), -0.01, 0.01, -0.02, 0.0]) for i in range(8)]
    assert tables.standing([same, sure, thin], same) == {"sure", "thin"}
    assert tables.standing([same, sure, thin, *rest], same) == {"sure"}


def running(process):
    """Whether a process is there and is not dead, waiting for somebody to ask for its exit code."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="lists the processes as Linux does")
@pytest.mark.processes
def test_the_command_that_is_killed_leaves_nothing_running_and_runs_each_run_once(tmp_path, monkeypatch, capsys):
    file, script = tmp_path / "runs.jsonl", Path(study.__file__)
    options = "--size tiny --steps 4 --rows golore_adamw,galore_i3s_adamw --trials 2 --most 2 --seeds 2"
    command = [sys.executable, str(script), *options.split(), "--file", str(file)]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (file.exists() and file.stat().st_size) and started.poll() is None:
        time.sleep(0.1)
    workers = [int(x) for x in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()]
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    assert workers
    deadline = time.monotonic() + 60
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(running, workers))
    finished = file.read_text()
    monkeypatch.setattr(sys, "argv", [*command[1:], "--jobs", "1"])
    study.main()
    assert file.read_text().startswith(finished)
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    keys = [(run["row"], *run["point"], run["seed"]) for run in runs]
    assert len(keys) == len(set(keys)) == 8
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*command[1:8], "--file", str(file)])
    tables.main()
    printed = capsys.readouterr().out
    assert printed.count("\n") == 4 and "galore_i3s_adamw" in printed


def test_rows_with_embeddings_and_head_of_their_own_are_those_whose_state_differs(text):
    torch.manual_seed(0)
    model = LlamaForCausalLM(training.llama_config(training.SIZES["tiny"], text.tokenizer, training.BLOCK))

    def dense_state(row):
        run = training.Run(row, Point(), "tiny", 2, 2)
        optimizer, matrices = training.optimizer_of(run, model)
        kept = {id(p) for p in matrices}
        return {name: sorted(plan.kept) for name, p, _, plan in optimizer.declared() if id(p) not in kept}

    fixed = dense_state(ROWS[BASELINE])
    own = {name: row.own for name, row in ROWS.items() if row.own}
    assert own.keys() == {"full_adamw_8bit", "scale_sgd"}
    for name, row in own.items():
        assert dense_state(ROWS[name]) == fixed and row.name == f"{name}, own dense"
    assert "exp_avg" not in dense_state(own["scale_sgd"])["model.embed_tokens.weight"]
    assert training.options(own["scale_sgd"], "tiny").keys().isdisjoint(training.FIXED)


@pytest.mark.parametrize("more, sentence", [
    (["--bytes", "-1"], "--bytes must be at least 0"),
    (["--bytes", "nan"], "--bytes must be finite"),
    (["--bytes", "1e-9", "--rows", "full_adamw"], "none of these rows fits"),
    (["--own", "--rows", "racs"], "embeddings and head as the fixed ones"),
    (["--minutes", "-1"], "--minutes must be at least 0"),
    (["--minutes", "nan"], "--minutes must be finite"),
    (["--trials", "8", "--most", "4"], "--most must be at least --trials, 8, not 4"),
    (["--start_from", "tiny:7"], "has no search of that size and length"),
    (["--file", "no/such/folder.jsonl"], "its folder does not exist"),
])  # fmt: skip
def test_what_cannot_be_run_is_one_sentence(more, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare_methods.py", *more])
    with pytest.raises(SystemExit) as ended:
        study.parse()
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_what_others_are_compared_with_is_tried_beside_its_search(tmp_path):
    """At the best points of its other formats, and AdamW where the two rates are traded for each other."""
    record = study.Record(tmp_path / "runs.jsonl")
    row, coded = ROWS["full_adamw"], ROWS["full_adamw_8bit"]

    def tried(row, point, loss):
        record.append(training.Run(row, point, "tiny", 4, 1), {"tune_loss": loss})

    tried(row, START, 2.0)
    tried(row, Point(0, 1), 1.0)
    tried(coded, Point(3, 0), 1.0)
    asked = study.Study((row,), "tiny", 4, trials=1, most=1, seeds=2)
    for point, loss in ((Point(3, 0), 0.9), (Point(4, -1), 1.1), (Point(2, 1), 1.2)):
        (run,) = asked.wanted(row, record)
        assert (run.seed, run.point) == (1, point)
        tried(row, point, loss)
    assert [(run.seed, run.point) for run in asked.wanted(row, record)] == [(2, Point(3, 0)), (3, Point(3, 0))]
