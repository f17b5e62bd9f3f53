"""The bases of matrices that step as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.tensors import products
from hf_lowrank.tensors.bases import Basis, Dense


@dataclass(frozen=True)
class Several(Basis):
    """The bases of the matrices of a stack, whose gradients lie in memory of their own: R is (k, r, n).

    Attributes:
        bases: one for each matrix.
        P: (k, m, r) if they are matrices that lie in one tensor, else None.
    """

    bases: Sequence[Basis]
    P: Tensor | None

    @classmethod
    def of(cls, bases: Sequence[Basis]) -> Several:
        """Gather bases; matrices that are one, or slices of one stack in their order, are multiplied together."""
        P = [basis.P for basis in bases if isinstance(basis, Dense)]
        if len(P) < len(bases):
            return cls(bases, None)
        if all(one is P[0] for one in P):
            return cls(bases, P[0].expand(len(P), *P[0].shape))
        stack = P[0]._base
        whole = stack is not None and stack.shape == (len(P), *P[0].shape)
        in_order = all(one._base is stack and one.storage_offset() == i * one.numel() for i, one in enumerate(P))
        return cls(bases, stack if whole and in_order else None)

    @override
    def project(self, G: Any) -> Tensor:
        if self.P is None:
            return torch.stack([basis.project(one) for basis, one in zip(self.bases, G, strict=True)])
        kind = self.bases[0].kind(G[0])  # type: ignore[attr-defined]
        A = self._of_each(lambda P: products.left_factor(P, kind))
        out = torch.empty(len(G), A.shape[-1], G[0].shape[-1], dtype=torch.float32, device=A.device)
        for product, factor, one in zip(out.unbind(0), A.unbind(0), G, strict=True):
            products.multiply_(product, factor, one, kind)
        return products.joined(out, kind)

    @override
    def factors(self, Z: Tensor, W: Tensor) -> tuple[Several, Tensor]:
        if self.P is None:
            return self, Z
        kind = products.chosen(self.bases[0].products, W)  # type: ignore[attr-defined]
        if not products.rounds(kind) or W.dtype == torch.float32:  # those are told by their own basis: it may be exact
            return self, Z
        return Several([Dense(P, kind) for P in self._of_each(Tensor.bfloat16).unbind(0)], None), Z.bfloat16()

    def _of_each(self, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what is made of every P; once, where all share one."""
        assert self.P is not None
        if self.P.stride(0):
            return make(self.P)
        one = make(self.P[0])
        return one.expand(len(self.P), *one.shape)

    @override
    def gram(self) -> Tensor:
        return torch.stack([basis.gram() for basis in self.bases])

    @override
    def add_(self, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        raise TypeError("every matrix of a stack is written by its own basis")

    @override
    def rows(self, start: int, length: int) -> Several:
        P = None if self.P is None else self.P.narrow(-2, start, length)
        return Several([basis.rows(start, length) for basis in self.bases], P)
