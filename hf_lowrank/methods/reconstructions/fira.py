"""The residual of the gradient, scaled like the subspace and limited in growth: Fira."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


NO_RESIDUAL = 1e-5
"""Share of the gradient's squared norm under which the residual is rounding noise and counts as none."""

NO_PROJECTION = 1e-12
"""Share of a column's squared norm under which its projection is rounding noise: no factor can be had from it."""


@dataclass(frozen=True)
class Fira(Reconstruction, key="fira"):
    """U = alpha P N + phi(S), S the residual of the gradient, phi_j = ||N_j|| / ||R_j|| per column, growth limited.

    Three forms, written with L = max(||S_t|| / ||S_{t-1}||, limiter) / limiter and c_t the bias correction:

    * `released` (default, the authors' code): U = alpha P N + phi (G - alpha P R) / L
    * `i3s` (as the I3S paper prints it): U = alpha P N + phi (G - P R) / L
    * `paper` (as the Fira paper prints it): U = alpha (P N + phi (G - P R) / L), phi and L from the corrected N

    All are U = P Z + G diag(d): two matrix products, no residual is ever formed. Its column norms follow from
    ||G_j - a P R_j||^2 = ||G_j||^2 - 2a ||R_j||^2 + a^2 R_j^T (P^T P) R_j.

    SubTrack++'s recovery scaling is the same thing: its code is that of `released`, its paper prints `i3s`.

    At r = m nothing is left over in `i3s` and `paper`; `released` keeps (1 - alpha) G, as the authors' code does.

    References:
        Fira, arXiv 2410.01623, Algorithm 1; I3S, arXiv 2502.05790, section 2.2.

    Differs from the authors' code: a residual that is rounding noise leaves the limiter unset instead of locking it
    (growth of 1 % a step from zero takes some 1850 steps to recover), and nothing waits for the device.
    """

    needs_gradient: ClassVar[bool] = True
    by_columns: ClassVar[bool] = True
    gauges: ClassVar[Mapping[str, Gauge]] = {
        "residual_share": Gauge("share of the gradient's squared norm outside the subspace"),
        **LIMITED,
    }

    fira_form: str = choice("released", "i3s", "paper", help="which of the three published forms")
    limiter: float = again(LIMITER)

    @override
    def slots(self) -> Slots:
        """The limited norm of the last residual, 0 while unset."""
        return {"residual_norm": Slot("", values="exact")}

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Asking[Update]:
        within = ctx.scale if self.fira_form == "released" else 1.0  # share of P R that the residual leaves out
        if ctx.r == ctx.m and within == 1.0:  # no residual
            return Update(N, ctx.scale)
        corrected = c_t if self.fira_form == "paper" else 1.0
        eps = ctx.eps if self.fira_form == "paper" else 1e-8
        r_squared = kernels.column_squared_norms(R)  # (..., n)
        g_squared = norms.gradient()
        residual = torch.add(g_squared, norms.projected(R, r_squared), alpha=within**2)
        residual.add_(r_squared, alpha=-2 * within).clamp_min_(0)
        phi = kernels.column_norms(N).mul_(corrected).div_(r_squared.sqrt().add_(eps))
        phi.masked_fill_(r_squared <= NO_PROJECTION * g_squared, 0.0)
        totals = yield Sum(torch.stack([phi.square().mul_(residual), residual, g_squared]).sum(-1), over="columns")
        phi.div_(self._limit_(s, totals, eps).unsqueeze(-1) * corrected)
        if self.fira_form == "i3s":
            return Update(torch.addcmul(N, R, phi.unsqueeze(-2), value=-1 / ctx.scale), ctx.scale, phi)
        Z = torch.addcmul(N, R, phi.unsqueeze(-2), value=-1)
        return Update(Z, ctx.scale, phi if self.fira_form == "released" else phi * ctx.scale)

    def _limit_(self, s: State, totals: Tensor, eps: float) -> Tensor:
        """Return L (...,), infinite where there is no residual; store the limited norm and the residual's share."""
        scaled, residual, gradient = totals.unbind(0)
        share = torch.div(residual, gradient.clamp_min(torch.finfo(torch.float32).tiny), out=s["residual_share"])
        none = (share > NO_RESIDUAL).logical_not_()  # also where it is not a number:
        share.nan_to_num_(nan=1.0)  # squares may overflow where R does not
        L = limit_(s, "residual_norm", scaled.sqrt(), self.limiter, eps, none)
        return L.masked_fill_(none, torch.inf)
