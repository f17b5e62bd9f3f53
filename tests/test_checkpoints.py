"""Damaged checkpoints are refused in a sentence, before anything is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lowrank import LowRankOptimizer


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
