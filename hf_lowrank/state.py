"""Optimizer state as declared data: which tensors a part owns, how they are allocated, how many bytes they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor


FORMAT_VERSION = 1
"""Version of the layout of `optimizer.state_dict()`; stored in every group."""

Kind = Literal["basis", "moment", "variance", "exact", "counter"]
Slots = Mapping[str, "Slot"]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """One tensor of a parameter's state.

    Attributes:
        shape: its shape.
        kind: what it holds. `basis` tensors change at refreshes only; `moment` (signed) and `variance` (non-negative)
            change at every step; `exact` is fp32 in every format; `counter` is an int64 scalar that lives on the CPU,
            so that the host may read it without waiting for the device.
        axes: start as the first axes (ones on the diagonal) instead of zeros.
    """

    shape: tuple[int, ...]
    kind: Kind = "moment"
    axes: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The stored number format."""
        return torch.int64 if self.kind == "counter" else torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def device(self, weight: Tensor) -> torch.device:
        """Where the tensor lives for a parameter `weight`."""
        return torch.device("cpu") if self.kind == "counter" else weight.device

    def allocate(self, weight: Tensor) -> Tensor:
        """Return the initial tensor for a parameter `weight`."""
        tensor = torch.zeros(self.shape, dtype=self.dtype, device=self.device(weight))
        if self.axes:
            tensor.diagonal(dim1=-2, dim2=-1).fill_(1)
        return tensor


def allocate(slots: Slots, weight: Tensor) -> State:
    """Return freshly initialised state for one parameter."""
    return {name: slot.allocate(weight) for name, slot in slots.items()}


def mismatch(slots: Slots, saved: Mapping[str, object]) -> str | None:
    """Say how a saved state differs in structure from the declared one, or None if it does not."""
    if missing := sorted(set(slots) - set(saved)):
        return f"it lacks {', '.join(missing)} (it has: {', '.join(sorted(saved)) or 'nothing'})"
    if extra := sorted(set(saved) - set(slots)):
        return f"it has {', '.join(extra)}, which this method does not keep"
    for name, slot in slots.items():
        value = saved[name]
        if not isinstance(value, Tensor):
            return f"{name} is a {type(value).__name__}, not a tensor"
        if tuple(value.shape) != slot.shape or value.dtype != slot.dtype:
            return f"{name} is {value.dtype} {tuple(value.shape)}, expected {slot.dtype} {slot.shape}"
    return None


def nbytes(state: Mapping[str, object]) -> int:
    """Bytes of all tensors in one parameter's state."""
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))
