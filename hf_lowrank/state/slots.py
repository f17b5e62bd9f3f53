"""What is kept of a parameter: declared tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor


Kind = Literal["basis", "moment", "variance", "exact", "counter"]
Slots = Mapping[str, "Slot"]
State = Mapping[str, Tensor]
Raw = dict[str, Tensor]


@dataclass(frozen=True)
class Slot:
    """One tensor of a parameter's state.

    Attributes:
        shape: its shape.
        kind: what it holds. `basis` tensors change at refreshes only; `moment` (signed) and `variance` (non-negative)
            change at every step; `exact` is kept as declared in every format; `counter` is an int64 scalar that lives
            on the CPU, so that the host may read it without waiting for the device.
        axes: start as the first axes (ones on the diagonal) instead of zeros.
        dtype: how it is stored.
        form: name of its number format where an option of its own says so, else that of its kind.
    """

    shape: tuple[int, ...]
    kind: Kind = "moment"
    axes: bool = False
    dtype: torch.dtype = torch.float32
    form: str = ""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.numel * self.dtype.itemsize

    def device(self, weight: Tensor) -> torch.device:
        """Where the tensor lives for a parameter `weight`."""
        return torch.device("cpu") if self.kind == "counter" else weight.device

    def allocate(self, weight: Tensor) -> Tensor:
        """Return the initial tensor for a parameter `weight`."""
        tensor = torch.zeros(self.shape, dtype=self.dtype, device=self.device(weight))
        if self.axes:
            tensor.diagonal(dim1=-2, dim2=-1).fill_(1)
        return tensor


def counter() -> Slot:
    """Declare a counter."""
    return Slot((), "counter", dtype=torch.int64)
