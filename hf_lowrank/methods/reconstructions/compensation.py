"""The residual of the gradient, every column in units of what it usually is: Alice.

Legend: E = G - P R residual (..., m, n), never formed · c_j = ||E_j||^2 = ||G_j||^2 - 2 ||R_j||^2 + ||P R_j||^2 ·
p (..., n).
"""

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
from hf_lowrank.methods.options import again, number
from hf_lowrank.methods.parts import Reconstruction
from hf_lowrank.methods.reconstructions.fira import NO_RESIDUAL
from hf_lowrank.methods.registry import Gauge
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors import kernels
from hf_lowrank.tensors.sums import Asking, Sum


@dataclass(frozen=True)
class Compensation(Reconstruction, key="compensation"):
    """U = alpha (P N + a_c E diag(d) / L), d_j = sqrt(m - r) / sqrt(p_j), p <- b1 p + (1 - b1) c.

    With constant gradients the columns of E diag(d) have a mean square of 1 over the m - r dimensions that they have.
    L limits the growth of ||E diag(d)||. p is corrected for its start at zero where Adam's moments are
    (`correct_bias`). It is U = P Z + G diag(d'): two products, as Fira. At r = m nothing is left over.

    State: n + 1.

    References:
        Alice, arXiv 2502.07752, section 5 (compensation); a_c is 0.4, alpha 0.3 there (0.2 and 0.25 at 1.3B).

    Differs from the authors' code: none was released. The paper's moments decay by 0.9 both, with no correction of
    their start and no eps; here betas are those of the group, and Adam is Adam. The correction of p is ours: without
    it a first residual is sqrt(1 / (1 - b1)) times too large. A column whose residual is rounding noise gets none.
    """

    needs_orthonormal: ClassVar[bool] = True
    scales_residual: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = True
    by_columns: ClassVar[bool] = True
    gauges: ClassVar[Mapping[str, Gauge]] = LIMITED

    compensation: float = number(0.4, help="Alice: a_c, weight of what the subspace leaves out")
    limiter: float = again(LIMITER)

    @override
    def slots(self) -> Slots:
        """The running mean of c, and the limited norm of the last residual, 0 while unset."""
        return {"residual_sq": Slot("n", values="exact"), "residual_norm": Slot("", values="exact")}

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Asking[Update]:
        if ctx.r == ctx.m:  # no residual
            return Update(N, ctx.scale)
        c = outside(norms, R)  # (..., n)
        p = s["residual_sq"].lerp_(c, 1 - ctx.beta1)
        start = 1 - ctx.beta1 ** (ctx.age + 1) if ctx.correct_bias else 1.0
        d = torch.where((c > 0) & (p > 0), p, torch.inf).rsqrt_().mul_(sqrt((ctx.m - ctx.r) * start))
        total = yield Sum((d * c.sqrt()).square().sum(-1), over="columns")
        d *= (self.compensation / c_t / limit_(s, "residual_norm", total.sqrt(), self.limiter, 1e-8)).unsqueeze(-1)
        return Update(torch.addcmul(N, R, d.unsqueeze(-2), value=-1), ctx.scale, d * ctx.scale)


def outside(norms: ColumnNorms, R: Tensor) -> Tensor:
    """Return ||G_j - P R_j||^2 of every column, (..., n), and 0 where that is rounding noise."""
    g_squared, r_squared = norms.gradient(), kernels.column_squared_norms(R)
    c = torch.add(g_squared, norms.projected(R, r_squared)).sub_(r_squared, alpha=2)
    return c.masked_fill_(c <= NO_RESIDUAL * g_squared, 0.0)
