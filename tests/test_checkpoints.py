"""Damaged checkpoints are refused in a sentence, before anything is changed; what can be trained can be loaded."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import fitting
from torch import nn

from hf_lowrank import METHODS, LowRankOptimizer, param_groups
from hf_lowrank.engine.checks import config_of
from hf_lowrank.methods.dense import SplitOptions


def stepped() -> tuple[LowRankOptimizer, torch.nn.Parameter]:
    """Return an optimizer of one 8 x 6 matrix after one step."""
    p = torch.nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    optimizer = LowRankOptimizer([{"params": [p], "rank": 2}])
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_refused_by_name(value: float) -> None:
    optimizer, p = stepped()
    before = {key: tensor.clone() for key, tensor in optimizer.state[p].items()}
    saved = optimizer.state_dict()
    state = saved["state"][0]
    key = next(k for k, v in state.items() if v.is_floating_point() and v.dim() >= 2)
    state[key] = state[key].clone()
    state[key][0, 0] = value
    with pytest.raises(ValueError, match=f"{key} of parameter 0 holds NaN or infinity"):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(optimizer.state[p][k], before[k]) for k in before if k != key)


@pytest.mark.parametrize("what", [None, [], 3])
def test_what_is_no_dict_is_refused(what: Any) -> None:
    optimizer, _ = stepped()
    with pytest.raises(ValueError, match=f"not {type(what).__name__}"):
        optimizer.load_state_dict(what)


def test_a_flipped_byte_is_found_by_its_checksum(tmp_path: Path) -> None:
    checkpoints = pytest.importorskip("hf_lowrank.hf.checkpoints")
    optimizer, p = stepped()
    file = tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), file)
    (tmp_path / "trainer_state.json").write_text("{}")
    assert checkpoints.checkpoint_fault(tmp_path) == "scheduler.pt is missing"
    torch.save({}, tmp_path / "scheduler.pt")
    assert checkpoints.checkpoint_fault(tmp_path) is None
    data = bytearray(file.read_bytes())
    largest = max(optimizer.state[p].values(), key=lambda t: t.numel() * t.element_size())
    at = bytes(data).find(largest.contiguous().numpy().tobytes())
    assert at > 0
    data[at] ^= 0xFF
    file.write_bytes(data)
    assert "checksum" in checkpoints.checkpoint_fault(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"epoch": 1')
    assert "trainer_state.json" in checkpoints.checkpoint_fault(tmp_path)


FREE = {
    "frugal on rows": {"subspace": "rows", "rows": "top", "reconstruction": "frugal"},
    "no error feedback": {"moments": "sgd", "reconstruction": "error_feedback", "error_feedback": "off"},
}


@pytest.mark.parametrize("options", FREE.values(), ids=FREE)
def test_a_mixture_whose_parts_go_together_by_their_options_is_loaded_and_copied(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16))
    optimizer = LowRankOptimizer(param_groups(model, rank=4, **options), "lowrank")
    model(torch.ones(2, 16)).square().sum().backward()
    optimizer.step()
    for other in (copy.deepcopy(optimizer), LowRankOptimizer(param_groups(model, rank=4, **options), "lowrank")):
        other.load_state_dict(optimizer.state_dict())
        assert other.configs == optimizer.configs


@pytest.mark.parametrize("stable_spam", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_groups_are_resolved_again_to_what_they_were(name: str, stable_spam: bool) -> None:
    """After a load, or in a copy: dense groups too, on which it depends what the layerwise mode takes."""
    model = nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8))
    options = fitting(name, {"rank": 4, "stable_spam": stable_spam})
    optimizer = LowRankOptimizer(param_groups(model, method=name, **options))
    known = [
        replace(config, split=SplitOptions()) for config in optimizer.configs
    ]  # that is of the model, not of them
    assert [config_of(group) for group in optimizer.param_groups] == known


def test_a_group_that_was_added_after_the_last_step_is_saved_as_it_begins() -> None:
    def built() -> LowRankOptimizer:
        optimizer, _ = stepped()
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(6, 8))], "rank": 2})
        return optimizer

    optimizer, other = built(), built()
    other.load_state_dict(optimizer.state_dict())
    for one in (optimizer, other):
        for group in one.param_groups:
            (p,) = group["params"]
            p.grad = torch.full_like(p, 0.5)
        one.step()
    first, second = ([p for group in one.param_groups for p in group["params"]] for one in (optimizer, other))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_betas_that_are_a_list_are_no_change(recwarn: pytest.WarningsRecorder) -> None:
    optimizer, _ = stepped()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["betas"] = list(saved["param_groups"][0]["betas"])  # as JSON leaves them
    optimizer.load_state_dict(saved)
    assert not recwarn
