"""A basis that is trained beside the model: Online Subspace Descent.

Legend: P basis (..., m, r) · G gradient divided by its norm · A = P^T G (..., r, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import number
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.methods.subspaces.dominant import dominant
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors import kernels


@dataclass(frozen=True)
class Online(Subspace, key="online"):
    """P steps down f(P) = ||P P^T G - G||^2 by an AdamW of its own, after the weight has been written.

    With A = P^T G the gradient is 2 (P A A^T + G A^T P^T P - 2 G A^T): no residual and no autograd. The first basis is
    the dominant one, at whose own gradient f is stationary, so it first moves one step later. It is never made
    orthonormal again, so the size of P N drifts. Its learning rate follows the schedule of the model's.

    State: 3mr for P and its moments, in fp32: what is accumulated must not be rounded to fewer bits.

    References:
        Online Subspace Descent, arXiv 2408.12857, section 4 and its code.

    Differs from the authors' code: the gradient of f in closed form, and plain tensors as state, so that a run can be
    resumed. Kept from the code against the paper: no penalty on ||P^T P - I||, AdamW's weight decay of 0.01, and a
    learning rate of 1/200, which is one over the usual interval and not five times that of the model.
    """

    orthonormal: ClassVar[bool] = False
    late: ClassVar[bool] = True
    without: ClassVar[tuple[str, ...]] = ("update_proj_gap", "on_refresh", "stagger", "basis_format")

    basis_lr: float = number(
        0.005, help="Online Subspace Descent: learning rate of the basis at the peak of the schedule"
    )
    basis_weight_decay: float = number(0.01, help="Online Subspace Descent: decoupled weight decay of the basis")

    @override
    def slots(self) -> Slots:
        moment = Slot("m r", "basis", encoding="fp32")
        return {**super().slots(), "basis_exp_avg": moment, "basis_exp_avg_sq": moment}

    @override
    def first(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """The leading vectors."""
        return dominant(G, s["basis"], "gram", ctx)

    @override
    def refresh_(self, s: State, G: Tensor, ctx: Context) -> Tensor | None:
        if ctx.number == 0:
            return super().refresh_(s, G, ctx)
        P, M, V = s["basis"], s["basis_exp_avg"], s["basis_exp_avg_sq"]
        total = kernels.squared_norm(G)[..., None, None]
        G = G * torch.where(total > 0, total.rsqrt(), 0.0)
        A = P.mT @ G
        GA = G @ A.mT
        gradient = 2 * (P @ (A @ A.mT) + GA @ (P.mT @ P) - 2 * GA)
        t = ctx.number  # steps of the basis, this one included
        lr = self.basis_lr * (min(ctx.lr / ctx.peak_lr, 1.0) if ctx.peak_lr else float(ctx.lr > 0))
        M.lerp_(gradient, 1 - 0.9)
        V.mul_(0.999).addcmul_(gradient, gradient, value=1 - 0.999)
        denominator = V.sqrt().div_(sqrt(1 - 0.999**t)).add_(1e-8)
        P.mul_(1 - lr * self.basis_weight_decay).addcdiv_(M, denominator, value=-lr / (1 - 0.9**t))
        return None

    @override
    def interval_(self, s: State, gap: int, overlap: float) -> int:
        """Every step but the one that the first basis, which is stationary, came from, whenever that was."""
        return 1 if int(s["refreshes"]) else int(s["step"]) - int(s["refresh_at"]) + 2
