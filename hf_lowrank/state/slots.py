"""What is kept of a parameter: slots, which a part declares by the names of their axes, and buffers with lengths.

Axes of a weight seen wide, short side first: m its rows, n its columns, r the rank. From the names follow the shape,
the axis that is split over processes, the matrices of a stack one by one, the bytes, and the formula in the table of
methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """One tensor of a parameter's state, as a part declares it.

    Attributes:
        axes: names of its axes, separated by blanks: "m r", "r n"; a number stands for itself; "" is a scalar. A stack
            of matrices has one such tensor for each of them.
        lifetime: "step" for what changes at every step; "basis" for what changes at a refresh only; "next" for a basis
            that waits to be adopted; "gauge" for what is kept for the log alone, and is not counted in the table of
            methods.
        values: "signed" or "positive" (never negative, and divided by): number formats may encode them; "exact" is
            kept as declared in every format.
        held: whether it lies as the gradient does where that is split over processes; else as the projected gradient.
        shared: whether a stack of matrices has one for all of them.
        host: whether it lives on the CPU, so that the host may read it without waiting for the device.
        axes_first: start as the first axes (ones on the diagonal) instead of zeros.
        dtype: how it is stored.
        formerly: the name that it has in checkpoints of earlier versions, if another.
        encoding: name of its number format where an option of its own says so, else that of its lifetime.
    """

    axes: str
    lifetime: Literal["step", "basis", "next", "gauge"] = "step"
    values: Literal["signed", "positive", "exact"] = "signed"
    held: bool = False
    shared: bool = False
    host: bool = False
    axes_first: bool = False
    dtype: torch.dtype = torch.float32
    encoding: str = ""
    formerly: str = ""

    @property
    def of_basis(self) -> bool:
        """Whether it belongs to a basis, in use or to come."""
        return self.lifetime in ("basis", "next")

    def sized(self, lengths: Mapping[str, int], stack: tuple[int, ...] = (), split: str = "") -> Buffer:
        """Return the tensor for these lengths of the axes, for a stack of matrices; `split` see Buffer."""
        own = tuple(int(axis) if axis.isdigit() else lengths[axis] for axis in self.axes.split())
        return Buffer(self, own if self.shared else (*stack, *own), split=split)


def counter() -> Slot:
    """Declare a counter: one int64 number for a parameter, on the CPU."""
    return Slot("", values="exact", shared=True, host=True, dtype=torch.int64)


@dataclass(frozen=True)
class Buffer:
    """One tensor with its shape; `slot` says the rest.

    Attributes:
        slot: what it is.
        shape: its shape.
        turned: whether its last two axes lie in memory in the other order, as those of a weight do that is seen
            transposed.
        split: name of the axis that may be split over processes, as a stack may be. What lies at one place of those is
            a line: number formats keep lines apart, so that codes do not depend on the number of processes.
        start: the row of the whole at which a piece of a basis starts.
    """

    slot: Slot
    shape: tuple[int, ...]
    turned: bool = False
    split: str = ""
    start: int = 0

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * self.slot.dtype.itemsize

    def axis(self, name: str) -> int | None:
        """Return which axis has a name, counted from the first; None where it has none of that name."""
        own = self.slot.axes.split()
        return len(self.shape) - len(own) + own.index(name) if name in own else None

    @cached_property
    def sides(self) -> tuple[int, int, int]:
        """(before, line, after): what `flat` returns, seen so, has the lines along its second axis."""
        axis, first = self.axis(self.split), len(self.shape) - len(self.slot.axes.split())
        stack, length = prod(self.shape[:first]), 1 if axis is None else self.shape[axis]
        line = prod(n for i, n in enumerate(self.shape) if i >= first and i != axis)
        return (stack, line, length) if self.splits_last else (stack * length, line, 1)

    @cached_property
    def splits_last(self) -> bool:
        """Whether the axis that may be split is the last one in memory."""
        return self.axis(self.split) == len(self.shape) - 1 and not self.turned

    def per_line(self, slot: Slot, count: int) -> Buffer:
        """Return a tensor of `count` numbers for every line, along the one axis of `slot`."""
        stack, axis = self.shape[: len(self.shape) - len(self.slot.axes.split())], self.axis(self.split)
        if axis is None:
            return Buffer(slot, (*stack, count))
        names, lengths = [slot.axes, self.split], [count, self.shape[axis]]
        order = 1 if self.splits_last else -1
        return Buffer(replace(slot, axes=" ".join(names[::order])), (*stack, *lengths[::order]), split=self.split)

    def allocate(self, weight: Tensor) -> Tensor:
        """Return the initial tensor for a parameter `weight`."""
        device = torch.device("cpu") if self.slot.host else weight.device
        tensor = self.laid(torch.zeros(self.numel, dtype=self.slot.dtype, device=device))
        if self.slot.axes_first:
            tensor.diagonal(offset=self.start, dim1=-2, dim2=-1).fill_(1)
        return tensor

    def laid(self, flat: Tensor) -> Tensor:
        """Return numbers that are in the order of memory, (numel,), in this shape."""
        *stack, rows, columns = self.shape if self.turned else (0, 0)
        return flat.view(*stack, columns, rows).mT if self.turned else flat.view(self.shape)

    def flat(self, value: Tensor) -> Tensor:
        """Return a tensor of this shape in the order of memory, (numel,)."""
        return (value.mT if self.turned else value).reshape(-1)


Slots = Mapping[str, Slot]
Buffers = Mapping[str, Buffer]
State = Mapping[str, Tensor]
"""A parameter's state as its parts see it: fp32 tensors by the names of the slots."""
Stored = dict[str, Tensor]
"""A parameter's state as it is stored: an 8-bit `exp_avg` is `exp_avg` (codes) and `exp_avg.absmax`."""
