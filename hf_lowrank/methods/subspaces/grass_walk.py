"""A random walk on the Grassmann manifold: GrassWalk.

Legend: S basis (..., m, r) · X Gaussian (..., m, r) · T = (I - S S^T) X, a tangent, = U diag(sigma) V^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import number
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.methods.subspaces.dominant import dominant
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import random


@dataclass(frozen=True)
class GrassWalk(Subspace, key="grass_walk"):
    """S <- (S V cos(theta) + U sin(theta)) V^T, theta = angle sigma / sigma_1: a step along a random geodesic.

    The first basis is the dominant one; nothing looks at a later gradient. Every principal angle between a basis and
    the one before is at most `angle`.

    References:
        GrassWalk: Randomized Gradient Subspaces for Efficient Large Language Model Training, arXiv 2510.01878.

    Differs from the authors' code: none was read, nor the paper's text, but notes on it. The size of a step is ours:
    the largest angle, in radians.
    """

    angle: float = number(0.5, above=0.0, below=1.6, help="GrassWalk: largest angle of a step, in radians")

    @override
    def first(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """The leading vectors."""
        return dominant(G, s["basis"], "gram", ctx)

    @override
    def choose(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        if ctx.r == ctx.m:  # there is nowhere to go
            return s["basis"], None
        S, where = s["basis"], random.with_float64(ctx.device)
        X = torch.randn(S.shape, generator=ctx.generator(paired=False), dtype=torch.float32, device=where).double()
        wide = S.to(X)
        T = X - wide @ (wide.mT @ X)
        squares, V = torch.linalg.eigh(T.mT @ T)  # sigma^2, ascending
        sigma = squares.clamp_min(0).sqrt().unsqueeze(-2)
        theta = self.angle * sigma / sigma[..., -1:].clamp_min(torch.finfo(sigma.dtype).tiny)
        share = torch.where(theta > 0, theta.sin() / sigma.clamp_min(torch.finfo(sigma.dtype).tiny), 0.0)
        moved = ((wide @ V) * theta.cos() + (T @ V) * share) @ V.mT
        moved = 1.5 * moved - 0.5 * moved @ (moved.mT @ moved)  # a Newton step back to the nearest orthonormal matrix
        return moved.to(S), None
