"""Adam's two moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, sqrt
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.moments.transport import largest_direction, rotated_variance
from hf_lowrank.methods.parts import Moments
from hf_lowrank.methods.registry import TRANSPORTS
from hf_lowrank.state.slots import Slot, Slots, State


RUNAWAY = 100.0

NO_CORRECTION = 1e9  # a step count at which 1 - beta^t is 1 in floating point


@dataclass(frozen=True)
class Adam(Moments, key="adam"):
    """M <- b1 M + (1 - b1) R;  V <- b2 V + (1 - b2) R∘R;  N = M / (sqrt(V) + eps sqrt(1 - b2^t)).

    With the bias correction c_t = sqrt(1 - b2^t) / (1 - b1^t) outside, c_t N is exactly torch.optim.AdamW's direction.
    With `eps_place=released` it is N = M / (sqrt(V) + eps).

    Where a refresh rotates M into a slot whose V is next to nothing, M is kept within RUNAWAY times the largest
    direction that Adam's own moments can reach; it would be divided by that nothing otherwise.

    References:
        Adam, arXiv 1412.6980, Algorithm 1; GaLore, arXiv 2403.03507, Algorithm 2.

    Differs from the authors' code: GaLore and Fira add eps to the uncorrected sqrt(V), where it acts as eps / sqrt(1 -
    b2^t), at first 31 times as strongly; here it sits where torch puts it, unless `eps_place=released`. Moments are
    fp32 whatever the weights are.
    """

    elementwise: ClassVar[bool] = True
    images: ClassVar[int] = 0

    @override
    def slots(self, columns: Columns) -> Slots:
        return {"exp_avg": Slot("r n"), "exp_avg_sq": Slot("r n", values="positive")}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        N = torch.zeros_like(s["exp_avg"])
        _adamw_([N], [R], [s], [ctx], lr=-1 / self.step_scale(ctx), weight_decay=0.0)
        return N

    @override
    def step_scale(self, ctx: Context) -> float:
        return bias_correction(ctx)

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        M, V = s["exp_avg"], s["exp_avg_sq"]
        rotated = C @ M
        if how in ("rotate_variance", "rotate_variance_complete"):
            V.copy_(rotated_variance(C, M, rotated, V, complete=how == "rotate_variance_complete", ctx=ctx))
        elif how != "rotate":
            raise ValueError(f"on_refresh must be one of {', '.join(TRANSPORTS)}, got {how!r}")
        bound = largest_direction(ctx.beta1, ctx.beta2)
        if bound < inf:
            limit = RUNAWAY * bound * V.sqrt()
            rotated = rotated.clamp_(min=-limit, max=limit)
        M.copy_(rotated)

    def dense_step_(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], contexts: Sequence[Context]
    ) -> None:
        """Step all tensors in one fused call."""
        _adamw_(weights, grads, states, contexts, lr=contexts[0].lr, weight_decay=contexts[0].weight_decay)


def _adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    contexts: Sequence[Context],
    *,
    lr: float,
    weight_decay: float,
) -> None:
    """One AdamW step of fp32 tensors, by torch's fused kernel where the device has one."""
    fused: dict[tuple[torch.device, float], list[tuple[Tensor, ...]]] = {}
    for W, G, s, ctx in zip(weights, grads, states, contexts, strict=True):
        M, V, t = s["exp_avg"], s["exp_avg_sq"], _bias_step(ctx)
        eps = ctx.eps if ctx.eps_place == "torch" else ctx.eps / _root_correction(ctx)
        if has_fused_kernel(W.device) and _dense(W) and W.stride() == M.stride() == V.stride():
            G = G.contiguous() if W.is_contiguous() else G.mT.contiguous().mT
            fused.setdefault((W.device, eps), []).append((W, G, M, V, _step_tensor(t, W.device)))
            continue
        M.lerp_(G, 1 - ctx.beta1)
        V.mul_(ctx.beta2).addcmul_(G, G, value=1 - ctx.beta2)
        denominator = V.sqrt().div_(_root_correction(ctx)).add_(eps)
        W.mul_(1 - lr * weight_decay).addcdiv_(M, denominator, value=-lr / (1 - ctx.beta1**t))
    for (_, eps), here in fused.items():
        params, gradients, first, second, steps = map(list, zip(*here, strict=True))
        torch._fused_adamw_(
            params,
            gradients,
            first,
            second,
            [],
            steps,
            lr=lr,
            beta1=contexts[0].beta1,
            beta2=contexts[0].beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )


def _dense(W: Tensor) -> bool:
    """Tell whether a tensor lies without gaps, its last two axes in this order or the other: the kernel pairs elements
    as they lie."""
    return W.is_contiguous() or (W.dim() > 1 and W.mT.is_contiguous())


def bias_correction(ctx: Context) -> float:
    """Return c_t = sqrt(1 - b2^t) / (1 - b1^t), or 1 without the correction."""
    if not ctx.correct_bias:
        return 1.0
    return sqrt(1 - ctx.beta2**ctx.moment_step) / (1 - ctx.beta1**ctx.moment_step)


def eps_of_root(ctx: Context) -> float:
    """Return what is added to the uncorrected sqrt(V): eps sqrt(1 - b2^t), or eps for `eps_place=released`.

    The first is eps beside the corrected root sqrt(V) / sqrt(1 - b2^t).
    """
    return ctx.eps * (_root_correction(ctx) if ctx.eps_place == "torch" else 1.0)


def _root_correction(ctx: Context) -> float:
    """Return sqrt(1 - b2^t), or 1 without the correction."""
    return sqrt(1 - ctx.beta2 ** _bias_step(ctx))


def _bias_step(ctx: Context) -> float:
    return float(ctx.moment_step) if ctx.correct_bias else NO_CORRECTION


@lru_cache(maxsize=64)
def _step_tensor(t: float, device: torch.device) -> Tensor:
    """Return t as the kernel wants it: on the device, so that nothing waits for it; it is only read."""
    return torch.full((), t, dtype=torch.float32, device=device)


@lru_cache
def has_fused_kernel(device: torch.device) -> bool:
    """Tell whether torch's fused AdamW kernel runs on `device`: tried once on one element."""
    one = [torch.zeros(1, dtype=torch.float32, device=device) for _ in range(4)]
    step = torch.ones((), dtype=torch.float32, device=device)
    try:
        torch._fused_adamw_(  # type: ignore[call-overload]
            *([x] for x in one),
            [],
            [step],
            lr=0.0,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1.0,
            amsgrad=False,
            maximize=False,
        )
    except (RuntimeError, NotImplementedError):
        return False
    return True
