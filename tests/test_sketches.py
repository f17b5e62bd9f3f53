"""Sketches that are drawn from a key: never in an ordinary step, however many shapes a model has."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from fitting import fitting

from hf_lowrank import LowRankOptimizer
from hf_lowrank.methods.subspaces import sketch


SHAPES = [(16 + 2 * k, 80) for k in range(sketch.KEPT + 3)]


@pytest.mark.parametrize("name", ["apollo_random_adamw", "flora_adafactor"])
@pytest.mark.parametrize("state", ["fp32", "4bit"])
def test_an_ordinary_step_draws_nothing_and_a_change_few(name, state, monkeypatch):
    """Two layers whose shapes come in turns, as those of a model do; 4-bit moments are decoded anew at every step."""
    drawn = []
    draw = sketch._draw
    monkeypatch.setattr(sketch, "_draw", lambda *key: drawn.append(key) or draw(*key))
    monkeypatch.setattr("hf_lowrank.state.view.SMALLEST_QUANTIZED", 128)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES * 2]
    options = fitting(name, {"rank": 4, "update_proj_gap": 3, "state_format": state})
    optimizer = LowRankOptimizer([{"params": params, **options}], name, seed=77)
    counts = []
    for _ in range(6):
        for p in params:
            p.grad = torch.ones_like(p)
        drawn.clear()
        optimizer.step()
        counts.append(len(drawn))
        assert max(Counter(drawn).values(), default=0) <= 2  # where it is chosen, and where the first matrix steps
    ordinary = [1, 2, 4, 5] if name == "apollo_random_adamw" else [1, 4]  # FLora's next sketch comes a step ahead
    assert all(counts[i] == 0 for i in ordinary), counts
    assert sum(counts) >= 2 * len(SHAPES), counts
    del optimizer
    gc.collect()
    assert len(sketch._in_use) <= sketch.KEPT
