"""A subspace that is tracked by rank-1 steps on the Grassmann manifold: SubTrack.

Legend: S basis (..., m, r) · A = S^T G (..., r, n) · T = (G - S A) A^T tangent (..., m, r), its leading triple u (...,
m), sigma, v (..., r) · theta rotation angle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import choice, flag, number
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.methods.subspaces.dominant import dominant
from hf_lowrank.state.slots import Slot, Slots, State, counter
from hf_lowrank.tensors import kernels


NOTHING_OUTSIDE = 1e-7
"""Tangent, in units of ||G||^2, under which it is rounding noise and the basis stays."""


@dataclass(frozen=True)
class Grassmann(Subspace, key="grassmann"):
    """S <- S + [(cos theta - 1) S v + sin theta u] v^T: a geodesic towards less error ||G - S A||^2.

    The first basis is the dominant one. The gradient of the error is -2T, of which the leading triple alone is
    followed. Three step sizes:

    * `auto` (default): theta = atan2(2 sigma, a - b) / 2 with a = ||A^T v||^2, b = ||G^T u||^2, the exact minimum
      along the geodesic; no parameter, and the size of the gradient does not matter
    * `normalized`: theta = eta 2 sigma / ||G||_F^2
    * `raw`: theta = eta 2 sigma, as both papers have it; sigma grows with the square of the gradient

    With `accumulate` G is the mean of the gradients since the last refresh, kept in an m x n buffer.

    References:
        SubTrack (workshop), eqs. 2-6 and Algorithm 1; SubTrack++, arXiv 2502.01586, section 2, eqs. 1-5. The line
        search is ours.

    Differs from the authors' code: tall and square matrices are tracked too (there the tangent is multiplied by zero);
    fp32, kept orthonormal. The workshop's eq. 6 as printed moves uphill: `direction=printed` does that.

    SubTrack++'s moments are carried along here as the paper says, at the step at which the basis moves. Its code does
    so one step earlier and after that step's own gradient; by the change from the basis of step 0 rather than from the
    one before; on moments without bias correction; and multiplies the new V by 1 - b2 in the place of 1 - b2^t, a
    thousandth of what it was. Its recovery scaling is Fira's code, `fira_form=released`, from which the published
    losses come: the residual is G - alpha P R and is not multiplied by alpha. The alpha of the paper's W - alpha (G^ +
    Lambda) is its learning rate, and its residual G - P R: that is `fira_form=i3s`.
    """

    step: str = choice("auto", "normalized", "raw", help="SubTrack: how far a step goes")
    eta: float = number(10.0, above=0.0, help="SubTrack: step size of normalized and raw; auto has none")
    accumulate: bool = flag(False, help="SubTrack: track the mean gradient of the interval, with an m x n buffer")
    direction: str = choice("descending", "printed", help="SubTrack: sign of the step; printed is eq. 6, uphill")

    def __post_init__(self) -> None:
        if self.direction == "printed" and self.step == "auto":
            raise ValueError("direction=printed needs step=raw or step=normalized: step=auto only ever descends")

    @property
    @override
    def needs_gradient(self) -> bool:
        return self.accumulate

    @property
    @override
    def replaces_gradient(self) -> bool:
        return self.accumulate

    @override
    def slots(self) -> Slots:
        if not self.accumulate:
            return super().slots()
        return {
            **super().slots(),
            "gradients": Slot("m n", values="exact", held=True),
            "gradients_seen": replace(counter(), formerly="seen"),
        }

    @override
    def refresh_gradient(self, s: State, G: Tensor, ctx: Context) -> Tensor:
        return (s["gradients"] + G).div_(int(s["gradients_seen"]) + 1) if self.accumulate else G

    @override
    def accumulate_(self, s: State, G: Tensor) -> None:
        if self.accumulate:
            s["gradients"].add_(G)
            s["gradients_seen"].add_(1)

    @override
    def interval_(self, s: State, gap: int, overlap: float) -> int:
        if self.accumulate:
            s["gradients"].zero_()
            s["gradients_seen"].zero_()
        return gap

    @override
    def first(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """The leading vectors."""
        return dominant(G, s["basis"], "gram", ctx)

    @override
    def refresh_(self, s: State, G: Tensor, ctx: Context) -> Tensor | None:
        if ctx.number == 0:
            return super().refresh_(s, G, ctx)
        G, S = G.float(), s["basis"]
        total = kernels.squared_norm(G)[..., None, None]
        G = G * torch.where(total > 0, total.rsqrt(), 0.0)  # of norm 1, so that no square overflows
        A = S.mT @ G
        T = G @ A.mT - S @ (A @ A.mT)
        u, sigma, v = _leading_triple(T, S)
        theta = self._angle(G, A, u, sigma, v, total)
        moved = (theta.cos() - 1) * (S @ v) + theta.sin() * u  # (..., m, 1)
        S.add_(moved @ v.mT)
        S.copy_(1.5 * S - 0.5 * S @ (S.mT @ S))  # one Newton step towards the nearest orthonormal matrix
        return None

    def _angle(self, G: Tensor, A: Tensor, u: Tensor, sigma: Tensor, v: Tensor, total: Tensor) -> Tensor:
        """Return theta (..., 1, 1) for a gradient of norm 1 whose squared norm was `total`."""
        if self.step == "auto":
            a, b = ((X.mT @ x).square().sum((-2, -1), keepdim=True) for X, x in ((A, v), (G, u)))
            theta = 0.5 * torch.atan2(2 * sigma, a - b)
        else:
            theta = 2 * self.eta * sigma * (total if self.step == "raw" else 1.0)
        theta = torch.where((sigma > NOTHING_OUTSIDE) & theta.isfinite(), theta, 0.0)
        return theta if self.direction == "descending" else -theta


def _leading_triple(T: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u (..., m, 1) orthogonal to S, sigma (..., 1, 1) and v (..., r, 1); zero u and sigma where T is zero."""
    values, vectors = torch.linalg.eigh(T.mT @ T)
    v = vectors[..., -1:]
    u = T @ v
    u = u - S @ (S.mT @ u)
    sigma = u.norm(dim=-2, keepdim=True)
    return u / sigma.clamp_min(torch.finfo(u.dtype).tiny), sigma, v
