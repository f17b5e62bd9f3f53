"""How an fp32 image of a weight is written back, stochastically where its type is smaller."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from hf_lowrank.tensors import fused, random
from hf_lowrank.tensors.kernels import blocks, piece


class Rounding:
    """How one parameter is written at one step: stochastically from a key, or to nearest.

    Args:
        key: of what is drawn; None for the nearest number.
        device: where the weight is.
    """

    def __init__(self, key: tuple[int, ...] | None, device: torch.device) -> None:
        self.key, self.device = key, device

    @cached_property
    def bits(self) -> random.Bits | None:
        """What is drawn from."""
        return None if self.key is None else random.Bits(random.generator(*self.key, device=self.device))

    def store_(self, target: Tensor, value: Tensor, start: int = 0) -> None:
        """Write an fp32 value, which is overwritten, to a piece of the weight that starts at an element."""
        if self.fuses(target) and value.stride() == target.stride():
            self.fused_(target, 0.0, value, 1.0, None, None, 0.0, start)
        else:
            round_(target, value, self.bits)

    def fuses(self, W: Tensor) -> bool:
        """Tell whether one kernel writes this weight (`fused_`)."""
        return self.key is not None and fused.fits(W)

    def fused_(
        self,
        W: Tensor,
        beta: float,
        U: Tensor | None,
        alpha: float,
        G: Tensor | None,
        d: Tensor | None,
        gamma: float,
        start: int = 0,
    ) -> None:
        """W <- beta W + alpha U + gamma G diag(d), in one kernel. See `fused.rewrite_`."""
        assert self.key is not None
        U, G = (
            X if X is None or X.stride() == W.stride() else torch.empty_like(W, dtype=X.dtype).copy_(X) for X in (U, G)
        )
        fused.rewrite_(W, beta, U, alpha, G, d, gamma, random.seed(*self.key, start))


def rewrite_(
    W: Tensor, update_: Callable[[Tensor, int, int], None], rounding: Rounding, *, blockwise: bool = False
) -> None:
    """Let `update_(block, start, length)` change an fp32 image of some columns of W in place.

    An fp32 weight is its own image, in one piece or `blockwise`; one of lower precision is cast in blocks, and rounded
    back.
    """
    own = W.dtype == torch.float32
    for start, length in blocks(W) if blockwise or not own else [(0, W.shape[-1])]:
        target = piece(W, start, length)
        image = target.float()  # itself if it is fp32
        update_(image, start, length)
        if not own:
            rounding.store_(target, image)


def round_(target: Tensor, value: Tensor, bits: random.Bits | None) -> None:
    """Write fp32 `value` into a bf16 or fp16 `target`: stochastically with random bits, else to nearest.

    The expectation of the written number is `value`, and a value that the format can hold is written exactly. `value`
    is overwritten.
    """
    dropped = fused.DROPPED.get(target.dtype)
    if bits is None or dropped is None:
        target.copy_(value)
        return
    if not value.is_contiguous() and value.dim() > 1:  # columns that lie in one piece
        target, value = target.mT, value.mT
    value = value.contiguous().nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)  # one NaN for all
    noise = bits.like(value, torch.int16 if dropped == 16 else torch.int32)
    small = None
    if dropped == 13:  # below 2^-14 fp16 has a fixed grid of 2^-24
        uniform = noise.bitwise_right_shift(8).float().mul_(2.0**-24).add_(0.5)
        scaled = value * 2.0**24
        below = scaled.floor()
        small = value.abs() < 2.0**-14, below.add_(uniform < scaled - below).mul_(2.0**-24)
        noise = noise.bitwise_right_shift(32 - dropped)
    value.view(torch.int32).add_(noise).add_(2 ** (dropped - 1)).bitwise_and_(-(2**dropped))
    target.copy_(value if small is None else torch.where(small[0], small[1], value))
