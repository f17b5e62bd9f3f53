"""The basis whose columns are blocks of rows: projecting sums, going back repeats.

Legend: G gradient (..., m, n) · R = P^T G (..., r, n) · W weight (..., m, n) · Z coefficients (..., r, n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.tensors import kernels
from hf_lowrank.tensors.bases import Basis


@dataclass(frozen=True)
class Blocks(Basis):
    """Column k of P is `factor` on the rows k b .. (k+1) b - 1 and zero elsewhere; the last block may be short.

    Attributes:
        m: rows.
        size: b, rows of a block.
        factor: the value of every entry.
        squares: whether R also holds the blocks of G∘G below those of G, (..., 2r, n).
    """

    m: int
    size: int
    factor: float
    squares: bool = False

    def fold(self, X: Tensor) -> Tensor:
        """Return the sum over every block times the factor, (..., r, n), in fp32."""
        whole = self.m // self.size * self.size
        blocks = X.narrow(-2, 0, whole).reshape(*X.shape[:-2], self.m // self.size, self.size, X.shape[-1])
        folded = blocks.sum(-2, dtype=torch.float32)
        if whole < self.m:  # a short last block
            rest = X.narrow(-2, whole, self.m - whole).sum(-2, keepdim=True, dtype=torch.float32)
            folded = torch.cat([folded, rest], -2)
        return folded.mul_(self.factor)

    def repeat(self, X: Tensor) -> Tensor:
        """Return every row of X (..., r, n) on all rows of its block, (..., m, n)."""
        if self.size >= self.m:
            return X.expand(*X.shape[:-2], self.m, X.shape[-1]).contiguous()
        return X.repeat_interleave(self.size, -2).narrow(-2, 0, self.m)

    @override
    def project(self, G: Tensor) -> Tensor:
        if not self.squares:
            return self.fold(G)
        G = G.float()
        return torch.cat([self.fold(G), self.fold(G.square())], -2)

    @override
    def witness(self, R: Tensor) -> Tensor:
        """The squares of what is squared already would not fit long before the moments overflow."""
        return R.narrow(-2, R.shape[-2] // 2, R.shape[-2] // 2).sqrt() if self.squares else R

    @override
    def add_(self, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        kernels.scaled_(W, beta).add_(self.repeat(Z), alpha=alpha * self.factor)
