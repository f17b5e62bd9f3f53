"""What a basis can do, whatever form it has: a stored matrix, an index of rows, blocks of rows, a pair of matrices.

Legend: G gradient (..., m, n) · R = P^T G (..., r, n) · W weight (..., m, n) · Z coefficients (..., r, n) · C =
P_new^T P_old (..., r, r).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.tensors import kernels, products


class Basis(ABC):
    """A linear map P from coefficients to matrices."""

    @abstractmethod
    def project(self, G: Tensor) -> Tensor:
        """Return R = P^T G in fp32; G may be of lower precision. Any entry of G that is not finite makes R so."""

    @abstractmethod
    def add_(self, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        """W <- beta W + alpha P Z for any columns of an fp32 matrix."""

    def rows(self, start: int, length: int) -> Basis:
        """Return the same map onto some rows only, for subspaces whose rows may be split."""
        raise NotImplementedError

    def gram(self) -> Tensor:
        """Return P^T P (..., r, r)."""
        raise NotImplementedError

    def changes(self, old: Basis) -> list[Tensor]:
        """Return the change of basis from `old` for every side that is projected: [C], or [C, C of the right side]."""
        raise NotImplementedError

    def spread(self, Z: Tensor | None, d: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Return coefficients for the columns of the weight that are held: Z (..., r, n) from the shape of R, and a
        factor d (..., n) of every column."""
        return Z, d

    def columns(self, x: Tensor) -> Tensor:
        """Return (..., n) as the columns of R lie, from what the rows that are held add to it."""
        return x

    def multiplied(self, kind: str, *, exact: bool = False) -> Basis:
        """Return the same map, whose matrix products are of this kind (tensors.products).

        Args:
            kind: the precision.
            exact: whether the factors of products with gradients, or for fp32 matrices, are never rounded to bf16 or
                TF32, whatever `kind` says: for rules that look at the small rest of G - P R.
        """
        return self

    def witness(self, R: Tensor) -> Tensor:
        """Return what of R tells whether the gradient is finite, and the sum of its squares a number in fp32.

        That is R itself where readings are changed in place: in clipping, accumulation, and averages over replicas.
        """
        return R

    def factors(self, Z: Tensor, W: Tensor) -> tuple[Basis, Tensor]:
        """Return the map and coefficients with which a weight is written: rounded to bf16, once for all blocks, where
        products for that weight are (an fp32 image of a block does not tell)."""
        return self, Z

    def expand(self, Z: Tensor, like: Tensor) -> Tensor:
        """Return P Z (m, n), for coefficients of all columns, lying in memory as `like` does."""
        U = torch.zeros_like(like, dtype=torch.float32)
        self.add_(U, Z, beta=1.0, alpha=1.0)
        return U

    def accumulate_(self, X: Tensor, Z: Tensor, alpha: float) -> None:
        """X <- X + alpha P Z for a matrix X that lies as the gradient does, Z as R does."""
        whole, _ = self.spread(Z)
        assert whole is not None
        self.add_(X, whole, beta=1.0, alpha=alpha)


@dataclass(frozen=True)
class Dense(Basis):
    """A matrix P (..., m, r).

    Attributes:
        P: the matrix, fp32; in bf16 where it was rounded to be multiplied.
        products: the precision of what is computed with it (tensors.products).
        exact: see `multiplied`.
    """

    P: Tensor
    products: str = "auto"
    exact: bool = False

    def kind(self, like: Tensor) -> str:
        """Return the precision of products of a gradient, or for an fp32 matrix."""
        unrounded = self.exact and self.products != "ieee"
        return products.unrounded(like) if unrounded else products.chosen(self.products, like)

    @override
    def project(self, G: Tensor) -> Tensor:
        kind, P = self.kind(G), self.P
        if G.dtype == P.dtype and kind == products.OWN:
            return P.mT @ G
        A = products.left_factor(P, kind)
        out = torch.empty(*G.shape[:-2], A.shape[-1], G.shape[-1], dtype=P.dtype, device=G.device)
        for block in kernels.blocks(G):  # a gradient of lower precision is cast one block of columns at a time
            products.multiply_(out.narrow(-1, *block), A, G.narrow(-1, *block), kind)
        return products.joined(out, kind)

    @override
    def multiplied(self, kind: str, *, exact: bool = False) -> Dense:
        return Dense(self.P, kind, exact)

    @override
    def factors(self, Z: Tensor, W: Tensor) -> tuple[Basis, Tensor]:
        kind = products.chosen(self.products, W)
        rounds = products.rounds(kind) and W.dtype != torch.float32
        return (Dense(self.P.bfloat16(), kind), Z.bfloat16()) if rounds else (self, Z)

    @override
    def expand(self, Z: Tensor, like: Tensor) -> Tensor:
        return products.expand(self.P, Z, like, products.chosen(self.products, like))

    @override
    def add_(self, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        products.add_(W, self.P, Z, beta=beta, alpha=alpha, kind=self.kind(W))

    @override
    def rows(self, start: int, length: int) -> Dense:
        return Dense(self.P.narrow(-2, start, length), self.products, self.exact)

    @override
    def gram(self) -> Tensor:
        return self.P.mT @ self.P

    @override
    def changes(self, old: Basis) -> list[Tensor]:
        assert isinstance(old, Dense)
        return [self.P.mT @ old.P]


@dataclass(frozen=True)
class Identity(Basis):
    """P = I (m, m): nothing is projected, and R is G (itself, where that is fp32)."""

    m: int

    @override
    def project(self, G: Tensor) -> Tensor:
        return G.float()

    @override
    def add_(self, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        kernels.scaled_(W, beta).add_(Z, alpha=alpha)

    @override
    def expand(self, Z: Tensor, like: Tensor) -> Tensor:
        return Z

    @override
    def rows(self, start: int, length: int) -> Basis:
        return SomeRows(self.m, start, length)


@dataclass(frozen=True)
class SomeRows(Basis):
    """Rows of the identity: R is the gradient where it has rows that are held, and zero elsewhere.

    Attributes:
        m: rows of R.
        start, length: which are held.
    """

    m: int
    start: int
    length: int

    @override
    def project(self, G: Tensor) -> Tensor:
        return torch.nn.functional.pad(G.float(), (0, 0, self.start, self.m - self.start - self.length))

    @override
    def add_(self, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        kernels.scaled_(W, beta).add_(Z.narrow(-2, self.start, self.length), alpha=alpha)

    @override
    def rows(self, start: int, length: int) -> SomeRows:
        return SomeRows(self.m, self.start + start, length)


@dataclass(frozen=True)
class TwoSided(Basis):
    """U = P Z Q^T with a second basis Q (..., n, k) for the columns, so that R = P^T G Q is (..., r, k)."""

    left: Basis
    right: Tensor
    products: str = "auto"

    @override
    def multiplied(self, kind: str, *, exact: bool = False) -> TwoSided:
        return TwoSided(self.left.multiplied(kind, exact=exact), self.right, kind)

    @override
    def project(self, G: Tensor) -> Tensor:
        """The product with Q is of what is small already: it is not rounded to bf16."""
        R = self.left.project(G)
        with products.precision(self.products):
            return R @ self.right

    @override
    def factors(self, Z: Tensor, W: Tensor) -> tuple[Basis, Tensor]:
        """Z has been spread over the columns."""
        return self.left.factors(Z, W)

    @override
    def add_(self, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        """Z has been spread over the columns."""
        self.left.add_(W, Z, beta=beta, alpha=alpha)

    @override
    def rows(self, start: int, length: int) -> TwoSided:
        return TwoSided(self.left.rows(start, length), self.right, self.products)

    @override
    def gram(self) -> Tensor:
        return self.left.gram()

    @override
    def changes(self, old: Basis) -> list[Tensor]:
        assert isinstance(old, TwoSided)
        return [*self.left.changes(old.left), self.right.mT @ old.right]

    @override
    def spread(self, Z: Tensor | None, d: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        if Z is None:
            return None, d
        with products.precision(self.products):
            return Z @ self.right.mT, d


@dataclass(frozen=True)
class SelectedRows(Basis):
    """Column k of P is `scale[k]` at row `index[k]` and zero elsewhere: projecting is indexing.

    Attributes:
        index: (..., r) int64; an index may come twice.
        scale: (..., r), zero where the row is not among those that are held.
    """

    index: Tensor
    scale: Tensor

    @override
    def project(self, G: Tensor) -> Tensor:
        index = self.index.unsqueeze(-1).expand(*self.index.shape, G.shape[-1])
        unseen = kernels.sum_of_squares(G).mul_(0)  # NaN if a row that is not taken is bad
        if not G.shape[-2]:  # a process may hold no row at all
            G = G.new_zeros(*G.shape[:-2], 1, G.shape[-1])
        return G.gather(-2, index).to(self.scale.dtype).mul_(self.scale.unsqueeze(-1)).add_(unseen)

    @override
    def add_(self, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        if not W.shape[-2]:
            return
        index = self.index.unsqueeze(-1).expand(*self.index.shape, W.shape[-1])
        kernels.scaled_(W, beta).scatter_add_(-2, index, Z * (alpha * self.scale).unsqueeze(-1))

    @override
    def rows(self, start: int, length: int) -> SelectedRows:
        inside = (self.index >= start) & (self.index < start + length)
        return SelectedRows((self.index - start).clamp(0, max(0, length - 1)), self.scale * inside)

    @override
    def gram(self) -> Tensor:
        return self._same(self) * self.scale.unsqueeze(-1) * self.scale.unsqueeze(-2)

    @override
    def changes(self, old: Basis) -> list[Tensor]:
        """A slot takes over the mean of the old slots that held its row, scales aside."""
        assert isinstance(old, SelectedRows)
        same = self._same(old)
        return [same / same.sum(-1, keepdim=True).clamp_min(1)]

    def _same(self, other: SelectedRows) -> Tensor:
        return (self.index.unsqueeze(-1) == other.index.unsqueeze(-2)).to(self.scale.dtype)
