"""The study of subspaces: what its numbers are, and that a finished run is not run again."""

import json
from math import sqrt
from statistics import mean

import pytest
import torch

from recipes.studies import subspaces


def test_shared_directions_are_counted():
    Q = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    assert subspaces.shared([Q[:, :4]], [Q[:, 2:6]]) == pytest.approx(2)
    tilted = (Q[:, :1] + Q[:, 8:9]) / sqrt(2)  # at 45 degrees
    assert subspaces.shared([Q[:, :4]], [tilted]) == pytest.approx(0.5)


def test_a_spike_is_above_what_came_before_and_a_falling_loss_has_none():
    falling = [5 - 0.01 * i + 0.02 * (i % 3) for i in range(60)]
    assert subspaces.spikes(falling) == []
    falling[40] += 1
    assert subspaces.spikes(falling) == [40]


def test_thirds_cover_everything_once():
    values = [*range(11)]
    assert [x for i in range(3) for x in subspaces.third(values, i)] == values


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch, capsys):
    """All rows, one seed; the tiny model has one layer of width 16, so ranks are 4."""
    file = tmp_path / "subspaces.jsonl"
    command = ["subspaces.py", "--size", "tiny", "--steps", "101", "--seeds", "1", "--file", str(file)]
    monkeypatch.setattr("sys.argv", command)
    subspaces.main()
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    assert [run["method"] for run in runs] == [*subspaces.METHODS]
    for run in runs:
        assert len(run["overlaps"]) == (0 if run["method"] == "full_adamw" else 4)
        assert all(0 < x < 1.0001 for x in run["overlaps"]) and 0 < run["effective_rank"] < 1
        assert 0 < run["same"][0][1] <= 4
    # the first probe comes before any step: the same for all
    assert len({tuple(run["same"][0]) for run in runs}) == 1
    first = capsys.readouterr().out
    monkeypatch.setattr(subspaces, "train", None)
    subspaces.main()
    assert capsys.readouterr().out == first and first.count("galore_i3s_adamw") == 2


def test_the_page_has_the_table_of_the_record():
    wanted = {"size": "small", "steps": 600, "setting": subspaces.SETTING}
    runs = [run for run in subspaces.Lines(subspaces.FILE).runs if wanted.items() <= run.items()]
    table, probes = subspaces.tables(runs).split("\n\n")
    section = (subspaces.HERE / "README.md").read_text().partition("## Subspaces")[2].partition("## State")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    shown = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    assert shown == [[cell.strip() for cell in line.split("|")[1:-2]] for line in table.splitlines()[2:]]
    same, later = (cell.split() for cell in probes.splitlines()[2].split("|")[2:4])
    for middle, _, half in (same, later):
        assert f"{float(middle):.1f} ± {float(half):.1f}" in section


def test_the_page_says_what_batches_share_by_step():
    runs = [run for run in subspaces.Lines(subspaces.FILE).runs if run["method"] == "galore_dominant_adamw"]
    by_step = {
        kind: {int(runs[0][kind][i][0]): mean(run[kind][i][1] for run in runs) for i in range(len(runs[0][kind]))}
        for kind in ("same", "later")
    }
    page = subspaces.FILE.with_name("README.md").read_text()
    for step, words in ((500, "{later:.1f} are shared with those"), (500, "of one step share {same:.1f}")):
        assert words.format(**{kind: found[step] for kind, found in by_step.items()}) in page
    assert "(at step 100: {later:.1f} and {same:.1f})".format(**{k: v[100] for k, v in by_step.items()}) in page
