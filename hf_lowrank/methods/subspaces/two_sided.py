"""Both sides projected: proj_type=full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.bases import Basis, TwoSided


@dataclass(frozen=True)
class BothSides(Subspace):
    """R = P^T G Q (r, r) and U = P N Q^T, P and Q chosen by the same rule from G and from its transpose.

    Where both are singular vectors of one gradient R is diagonal at the refresh. Its other entries are rounding noise,
    which Adam makes as large as the rest until later gradients outweigh it.

    State: mr + nr for the bases and 2r^2 for Adam's moments.

    References:
        GaLore, arXiv 2403.03507 (both projections) and its code's proj_type=full.

    Attributes:
        inner: the rule.

    Differs from the authors' code: the sides are those of the weight seen short side first.
    """

    projected: ClassVar[str] = "r r"

    inner: Subspace

    def __post_init__(self) -> None:
        if set(self.inner.slots()) != {"basis"} or self.inner.needs_momentum or self.inner.needs_gradient:
            raise ValueError("proj_type=full needs a subspace that is one stored basis: use another proj_type")

    @override
    def rank(self, m: int, n: int, rank: float) -> int:
        return self.inner.rank(m, n, rank)

    @property
    @override
    def begins_apart(self) -> bool:
        return self.inner.begins_apart

    @override
    def slots(self) -> Slots:
        return {
            **self.inner.slots(),
            "right_basis": Slot("n r", "basis", axes_first=True),
        }

    @override
    def refresh_(self, s: State, G: Tensor, ctx: Context) -> Tensor | None:
        sigma = self.inner.refresh_(s, G, ctx)
        self.inner.refresh_({**s, "basis": s["right_basis"]}, G.mT, ctx._replace(m=G.shape[-1], right=True))
        return sigma

    @override
    def basis(self, s: State, ctx: Context) -> Basis:
        return TwoSided(self.inner.basis(s, ctx), s["right_basis"])
