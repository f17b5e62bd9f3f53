"""Sums over adjacent entries of the weight's own last axis: Haar wavelets (GWT) and folding (FOAM).

Both compress by a power of two, 2^level, which is the option rank = 2^-level. Nothing is chosen and nothing stored.
The weight's last axis is the rows of its transpose, hence proj_type=right.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import ClassVar

from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.subspaces.whole import Fixed
from hf_lowrank.state.slots import State
from hf_lowrank.tensors.bases import Basis
from hf_lowrank.tensors.row_blocks import Blocks


def block_size(rank: float) -> int:
    """Return 2^level for rank = 2^-level.

    Raises:
        ValueError: for any other rank.
    """
    level = -log2(rank)
    if level < 1 or level != int(level):
        raise ValueError(f"this method compresses by a power of two: rank must be 0.5, 0.25, 0.125, ..., got {rank:g}")
    return int(2**level)


class _Sums(Fixed):
    """Sums over blocks of 2^level rows."""

    composable: ClassVar[bool] = False
    orthonormal: ClassVar[bool] = False
    splits_rows: ClassVar[bool] = False

    @override
    def check_rank(self, rank: float) -> None:
        block_size(rank)

    @override
    def rank(self, m: int, n: int, rank: float) -> int:
        """One row of R for every block."""
        return -(-m // block_size(rank))


@dataclass(frozen=True)
class Haar(_Sums, key="haar"):
    """The approximation coefficients of a Haar transform of some level: sums over 2^level entries / 2^(level/2).

    References:
        GWT, arXiv 2501.07237, section 3.

    Differs from the authors' code: sums over blocks take the place of the transform and of the wavelet library that
    comes with it, so Haar is the only wavelet.
    """

    @override
    def basis(self, s: State, ctx: Context) -> Basis:
        size = block_size(ctx.rank)
        return Blocks(ctx.m, size, size**-0.5)


@dataclass(frozen=True)
class Fold(_Sums, key="fold"):
    """Means over 2^level adjacent entries, of G and of G∘G: R is (..., 2r, n). A short last block is filled with
    zeros.

    References:
        FOAM, arXiv 2512.07112; the rule: its code.

    Differs from the authors' code: nothing; both folds are taken in one pass.
    """

    projected: ClassVar[str] = "2 r n"

    @override
    def basis(self, s: State, ctx: Context) -> Basis:
        size = block_size(ctx.rank)
        return Blocks(ctx.m, size, 1 / size, squares=True)
