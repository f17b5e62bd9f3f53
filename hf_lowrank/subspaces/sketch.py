"""A Gaussian sketch that is drawn anew wherever it is used, and never stored: APOLLO, FLora."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_lowrank.bases import Basis, Dense
from hf_lowrank.formats import Slots, State
from hf_lowrank.parts import Context, Subspace


@dataclass(frozen=True)
class Sketch(Subspace, key="sketch"):
    """P (m, r) with entries N(0, 1/r), so that E[P P^T] = I; a new one at every refresh.

    It is a function of (seed, parameter, number of the refresh), drawn on the weight's device: state, none. The stream
    is the same on all processes, and after a resume, but not on another type of device. All matrices of a stack share
    one.

    References:
        APOLLO, arXiv 2412.05270, Algorithm 1; FLora, arXiv 2402.03293, section 2.4.

    Differs from the authors' code: neither the matrix nor a seed is kept.
    """

    orthonormal: ClassVar[bool] = False
    without: ClassVar[tuple[str, ...]] = ("basis_format",)

    def slots(self, batch: tuple[int, ...], m: int, n: int, r: int, piece: tuple[int, int]) -> Slots:
        """See `Subspace.slots`."""
        return {}

    def refresh_(self, s: State, G: Tensor, ctx: Context) -> Tensor | None:
        """See `Subspace.refresh_`."""
        return None

    def basis(self, s: State, ctx: Context) -> Basis:
        """See `Subspace.basis`."""
        generator = ctx.generator(ctx.device)
        return Dense(torch.randn(ctx.m, ctx.r, generator=generator, device=ctx.device).mul_(ctx.r**-0.5))
