"""Trainer on several processes: equal to one process with the same global batch, and resumed exactly."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CODED, arguments, tiny_llama, train
from processes import on_processes


pytestmark = pytest.mark.processes
WORKER = Path(__file__).parent / "parallel_worker.py"
OPTIONS = "rank=4,update_proj_gap=2,stagger=false"


@pytest.mark.parametrize(
    ("kind", "optim", "processes"),
    [
        ("ddp", "galore_dominant_adamw", 2),
        ("ddp", "fira_adamw", 2),
        pytest.param("ddp", "galore_dominant_adamw", 4, marks=pytest.mark.full),
        ("SHARDED_STATE_DICT", "galore_dominant_adamw", 2),
        ("SHARDED_STATE_DICT", "fira_adamw", 2),
        ("FULL_STATE_DICT", "fira_adamw", 2),
        ("SHARDED_STATE_DICT", "galore_dominant_adamw_layerwise", 2),
        ("SHARDED_STATE_DICT", "galore_dominant_adamw_8bit", 2),
    ],
)
def test_several_processes_equal_one(kind, optim, processes, tmp_path):
    result = on_processes(processes, WORKER, kind, optim, tmp_path)
    assert (tmp_path / "report.json").exists(), result.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["optimizer"] == "LowRankOptimizer"
    assert report["resumed exactly"] or (report["resumed exactly"] is None and kind == "ddp")  # see can_resume
    assert report["logged alike"] == report["resumed exactly"]  # no row doubled, none missing
    assert report["parameters"] == (["Parameter"] if kind == "ddp" else ["DTensor"])
    assert report["shared"] == (kind == "ddp") and not report["sharded"]
    assert report["logged"] == 6
    assert bool(report["coded"]) == ("8bit" in optim)
    sizes, same = (CODED, 1e-2) if "8bit" in optim else ({}, 1e-3)
    settings = arguments(tmp_path / "alone", optim, optim_args=OPTIONS, max_steps=6, max_grad_norm=0.0)
    alone = train(settings, tiny_llama(**sizes))
    moved = torch.load(tmp_path / "weights.pt")
    for a, b, zero in zip(moved, alone.model.parameters(), tiny_llama(**sizes).parameters(), strict=True):
        # sums of gradients in another order, amplified by Adam; with codes also by those that they tip
        assert (a - b).norm() <= same * (b - zero).norm() + 1e-7


OPTIM = "galore_dominant_adamw"


def test_all_processes_load_the_same_best_model(tmp_path):
    """Of shards nothing lies in the folder when Trainer looks whether it is there. Here the last step is the best."""
    result = on_processes(2, WORKER, "SHARDED_STATE_DICT", OPTIM, tmp_path, "best")
    assert result.returncode == 0, result.stderr[-4000:]
    found = [json.loads((tmp_path / f"best{rank}.json").read_text()) for rank in (0, 1)]
    assert found == [[6, str(tmp_path / "best" / "checkpoint-6"), True]] * 2


def close(moved, trainer):
    """Whether weights are those of a run on one process: sums of gradients in another order, amplified by Adam."""
    return all(
        (a - b).norm() <= 1e-3 * (b - zero).norm() + 1e-7
        for a, b, zero in zip(moved, trainer.model.parameters(), tiny_llama().parameters(), strict=True)
    )


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A run on two processes that share its state out, and its folder."""
    folder = tmp_path_factory.mktemp("sharded")
    result = on_processes(2, WORKER, "shard_state", OPTIM, folder)
    assert (folder / "report.json").exists(), result.stderr[-4000:]
    return json.loads((folder / "report.json").read_text()), folder


def run_on_one(folder, resume=None):
    """The same run on one process, with the same option, which has nobody to share with there."""
    options = f"{OPTIONS},shard_state=true"
    args = arguments(folder, OPTIM, optim_args=options, max_steps=6, max_grad_norm=0.0)
    return train(args, resume=resume)


def test_sharded_state_is_saved_whole_and_resumes_on_as_many_processes_and_on_one(sharded, tmp_path):
    report, folder = sharded
    alone = run_on_one(tmp_path / "alone")
    everything = list(alone.model.parameters())
    assert report["sharded"] and not report["shared"] and 0 < report["states"] < len(everything)
    assert report["resumed exactly"] in (True, None) and report["logged alike"] == report["resumed exactly"]
    assert report["logged"] == 6
    saved = torch.load(folder / "first" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert list(saved["state"]) == list(range(len(everything)))
    assert close(torch.load(folder / "weights.pt"), alone)
    again = run_on_one(tmp_path / "again", resume=str(folder / "first" / "checkpoint-3"))
    assert close([p.detach() for p in again.model.parameters()], alone)


@pytest.mark.full
def test_sharded_state_resumes_on_other_numbers_of_processes(sharded, tmp_path):
    alone = run_on_one(tmp_path / "alone")
    for kind in ("shard_state", "ddp"):
        result = on_processes(4, WORKER, kind, OPTIM, tmp_path, sharded[1] / "first" / "checkpoint-3")
        assert result.returncode == 0, result.stderr[-4000:]
        assert close(torch.load(tmp_path / "weights.pt"), alone)
