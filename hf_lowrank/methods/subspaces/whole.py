"""No subspace: every rule of moments as a full-rank optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.state.slots import Slots, State
from hf_lowrank.tensors.bases import Basis, Identity


class Unstored(Subspace):
    """A basis that is no state, and that no gradient chooses."""

    @override
    def slots(self) -> Slots:
        return {}

    @override
    def refresh_(self, s: State, G: Tensor, ctx: Context) -> Tensor | None:
        return None


class Fixed(Unstored):
    """A basis that is the same for ever."""

    without: ClassVar[tuple[str, ...]] = (
        "update_proj_gap",
        "on_refresh",
        "stagger",
        "basis_format",
        "shard_basis",
        "products",
    )

    @override
    def interval_(self, s: State, gap: int, overlap: float) -> int:
        """Never again."""
        return 2**62


@dataclass(frozen=True)
class Whole(Fixed, key="whole"):
    """P = I, R = G: the moments are those of the whole gradient, and the rank means nothing.

    The rows of this subspace see a weight with its outputs as columns (proj_type=right), whatever its shape: so the
    rules that tell outputs from inputs do what their papers say, and FSDP2, which splits outputs, moves nothing. Where
    layerwise is set the weight is stepped in the hook and the gradient freed at once.

    References:
        none; LOMO, arXiv 2306.09782, for the step in the hook.

    Differs from the authors' code: LOMO's ignores weight decay and clipping; here decay is applied, and
    clipping needs layerwise=offload.
    """

    whole: ClassVar[bool] = True
    projected: ClassVar[str] = "m n"

    @property
    @override
    def needs_gradient(self) -> bool:
        """R is the gradient: holding it back frees nothing."""
        return True

    @override
    def rank(self, m: int, n: int, rank: float) -> int:
        return m

    @override
    def basis(self, s: State, ctx: Context) -> Basis:
        return Identity(ctx.m)
