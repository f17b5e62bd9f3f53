"""How an fp32 image of a weight is written back, stochastically where its type is smaller."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_lowrank.tensors.kernels import blocks, piece


def rewrite_(
    W: Tensor,
    update_: Callable[[Tensor, int, int], None],
    rounding: Callable[[], torch.Generator | None],
    *,
    blockwise: bool = False,
) -> None:
    """Let `update_(block, start, length)` change an fp32 image of some columns of W in place.

    An fp32 weight is its own image, in one piece or `blockwise`; one of lower precision is cast in blocks, and rounded
    back.
    """
    if W.dtype == torch.float32:
        for start, length in blocks(W) if blockwise else [(0, W.shape[-1])]:
            update_(piece(W, start, length), start, length)
        return
    gen = rounding()
    for start, length in blocks(W):
        target = W.narrow(-1, start, length)
        image = target.float()
        update_(image, start, length)
        round_(target, image, gen)


def round_(target: Tensor, value: Tensor, gen: torch.Generator | None) -> None:
    """Write fp32 `value` into a bf16 or fp16 `target`: stochastically with a generator, else to nearest.

    The expectation of the written number is `value`, and a value that the format can hold is written exactly. `value`
    is overwritten.
    """
    dropped = {torch.bfloat16: 16, torch.float16: 13}.get(target.dtype)
    if gen is None or dropped is None:
        target.copy_(value)
        return
    if not value.is_contiguous() and value.dim() > 1:  # columns that lie in one piece
        target, value = target.mT, value.mT
    value = value.contiguous().nan_to_num_(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf)  # one NaN for all
    noise = _random_bits(value, torch.int16 if dropped == 16 else torch.int32, gen)
    small = None
    if dropped == 13:  # below 2^-14 fp16 has a fixed grid of 2^-24
        uniform = noise.bitwise_right_shift_(8).float().mul_(2.0**-24).add_(0.5)
        scaled = value * 2.0**24
        below = scaled.floor()
        small = value.abs() < 2.0**-14, below.add_(uniform < scaled - below).mul_(2.0**-24)
        noise.bitwise_right_shift_(11)
    bits = value.view(torch.int32)
    bits.add_(noise).add_(2 ** (dropped - 1)).bitwise_and_(-(2**dropped))
    target.copy_(value if small is None else torch.where(small[0], small[1], value))


def _random_bits(like: Tensor, dtype: torch.dtype, gen: torch.Generator) -> Tensor:
    """Return uniform integers of all values of a type, in the shape of another tensor, from draws of 64 bits."""
    draws = torch.empty(-(-like.numel() * dtype.itemsize // 8), dtype=torch.int64, device=like.device)
    return draws.random_(-(2**63), None, generator=gen).view(dtype)[: like.numel()].view(like.shape)
