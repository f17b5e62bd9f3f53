"""Both sides projected: proj_type=full."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.bases import Basis, TwoSided


@dataclass(frozen=True)
class BothSides(Subspace):
    """R = P^T G Q (r, r) and U = P N Q^T, P and Q chosen by the same rule from G and from its transpose.

    State: mr + nr for the bases and 2r^2 for Adam's moments.

    References:
        GaLore, arXiv 2403.03507, eq. 4 (both projections) and its code's proj_type=full.

    Attributes:
        inner: the rule.

    Differs from the authors' code: the sides are those of the weight seen short side first.
    """

    inner: Subspace

    def __post_init__(self) -> None:
        if set(self.inner.slots((), 2, 2, 1, (2, 2))) != {"basis"} or self.inner.wants or self.inner.needs_gradient:
            raise ValueError("proj_type=full needs a subspace that is one stored basis: use another proj_type")

    def rank(self, m: int, n: int, rank: float) -> int:
        """See `Subspace.rank`."""
        return self.inner.rank(m, n, rank)

    def shape(self, m: int, n: int, r: int) -> tuple[int, int]:
        """See `Subspace.shape`."""
        return (r, r)

    def slots(self, batch: tuple[int, ...], m: int, n: int, r: int, piece: tuple[int, int]) -> Slots:
        """See `Subspace.slots`."""
        return {
            **self.inner.slots(batch, m, n, r, piece),
            "right_basis": Slot((*batch, n, r), "basis", axes=True),
        }

    def refresh_(self, s: State, G: Tensor, ctx: Context) -> Tensor | None:
        """See `Subspace.refresh_`. One key for both sides, so that sampled singular vectors come in pairs."""
        sigma = self.inner.refresh_(s, G, ctx)
        self.inner.refresh_({**s, "basis": s["right_basis"]}, G.mT, ctx)
        return sigma

    def basis(self, s: State, ctx: Context) -> Basis:
        """See `Subspace.basis`."""
        return TwoSided(self.inner.basis(s, ctx), s["right_basis"])
