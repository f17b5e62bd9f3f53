"""Trainer on several processes: equal to one process with the same global batch, and resumed exactly."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CODED, arguments, tiny_llama, train
from processes import torchrun


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
        ("SHARDED_STATE_DICT", "galore_dominant_adamw_layerwise", 2),
        ("SHARDED_STATE_DICT", "galore_dominant_adamw_8bit", 2),
    ],
)
def test_several_processes_equal_one(kind, optim, processes, tmp_path):
    result = torchrun(processes, WORKER, kind, optim, tmp_path)
    assert (tmp_path / "report.json").exists(), result.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["optimizer"] == "LowRankOptimizer"
    assert report["resumed exactly"] or (report["resumed exactly"] is None and kind == "ddp")  # see can_resume
    assert report["logged alike"] == report["resumed exactly"]  # no row doubled, none missing
    assert report["parameters"] == (["Parameter"] if kind == "ddp" else ["DTensor"])
    assert report["shared"] == (kind == "ddp")
    assert report["logged"] == 6
    assert bool(report["coded"]) == ("8bit" in optim)
    sizes, same = (CODED, 1e-2) if "8bit" in optim else ({}, 1e-3)
    settings = arguments(tmp_path / "alone", optim, optim_args=OPTIONS, max_steps=6, max_grad_norm=0.0)
    alone = train(settings, tiny_llama(**sizes))
    moved = torch.load(tmp_path / "weights.pt")
    for a, b, zero in zip(moved, alone.model.parameters(), tiny_llama(**sizes).parameters(), strict=True):
        # sums of gradients in another order, amplified by Adam; with codes also by those that they tip
        assert (a - b).norm() <= same * (b - zero).norm() + 1e-7
