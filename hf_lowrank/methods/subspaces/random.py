"""A subspace that does not look at the gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import random


@dataclass(frozen=True)
class Random(Subspace, key="random"):
    """P uniform on the Stiefel manifold, so that E[P P^T] = (r/m) I.

    References:
        GoLore, arXiv 2410.11289, section 4 (its random projection, here at every refresh).

    Differs from the authors' code: thin QR of a Gaussian instead of an SVD (the same law), a keyed generator, and
    signs aligned with the basis before (the law of the subspace does not change).
    """

    @override
    def choose(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        return random.uniform_stiefel(
            s["basis"].shape, ctx.generator(paired=False), random.with_float64(ctx.device)
        ).to(s["basis"]), None
