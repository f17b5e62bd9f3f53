"""The gradient itself, scaled by what Adam does to it in the subspace: APOLLO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import ColumnNorms, Context, Update
from hf_lowrank.methods.limiter import LIMITED, LIMITER, limit_
from hf_lowrank.methods.options import again, choice
from hf_lowrank.methods.parts import Reconstruction
from hf_lowrank.methods.registry import Gauge
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors import kernels
from hf_lowrank.tensors.sums import Asking, Sum


@dataclass(frozen=True)
class ScaledGradient(Reconstruction, key="scaled_gradient"):
    """U = sqrt(scale) G diag(d), d_j = ||N_j|| / (||R_j|| + 1e-8) per column, or one d for the whole matrix.

    The growth of ||U|| is limited; with `limit=front` before the factor sqrt(scale), which is then not limited. While
    scale stays as it is the two are the same.
    The basis is used for d alone: nothing is projected back.

    State: one norm.

    References:
        APOLLO, arXiv 2412.05270, Algorithm 1; APOLLO-Mini is rank 1 with one d per matrix and scale 128.

    Differs from the authors' code: no host sync in the limiter; its state is a tensor in fp32.
    """

    needs_gradient: ClassVar[bool] = True
    by_columns: ClassVar[bool] = True
    gauges: ClassVar[Mapping[str, Gauge]] = LIMITED

    scaling: str = choice("channel", "tensor", help="APOLLO: one factor per column of the long side, or per matrix")
    limit: str = choice(
        "back",
        "front",
        help="APOLLO: limit the growth after or before the factor sqrt(scale); the same while scale is not edited",
    )
    limiter: float = again(LIMITER)

    @override
    def slots(self) -> Slots:
        """The limited norm of the last step, 0 while unset."""
        return {"norm": Slot("", values="exact")}

    @override
    def rate(self, scale: float) -> float:
        return sqrt(scale)

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Asking[Update]:
        factor = self.rate(ctx.scale)
        before = factor if self.limit == "back" else 1.0
        g_squared = norms.gradient()  # (..., n)
        if self.scaling == "channel":
            d = kernels.column_norms(N).div_(kernels.column_norms(R).add_(1e-8))
            total = yield Sum(d.square().mul_(g_squared).sum(-1), over="columns")
            norm = total.sqrt()
        else:
            parts = [N.square().sum((-2, -1)), R.square().sum((-2, -1)), g_squared.sum(-1)]
            sums = yield Sum(torch.stack(parts), over="columns")
            n, r, g = sums.sqrt().unbind(0)
            share = n / (r + 1e-8)
            d, norm = share.unsqueeze(-1).expand(g_squared.shape), share * g
        L = limit_(s, "norm", norm * before, self.limiter, 0.0)
        return Update(d=d * (factor / L).unsqueeze(-1))
