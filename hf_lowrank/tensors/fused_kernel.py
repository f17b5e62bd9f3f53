"""The kernel of `fused.rewrite_`; importing it needs Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


BLOCK = 1024
"""Elements of one program."""


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _kernel(  # type: ignore[no-untyped-def]  # the compiler reads annotations, and knows its own alone
    W,
    U,
    G,
    d,
    beta,
    alpha,
    gamma,
    seed,
    numel,
    columns,
    stride,
    READS: tl.constexpr,
    HAS_U: tl.constexpr,
    HAS_G: tl.constexpr,
    DROPPED: tl.constexpr,
    SIZE: tl.constexpr,
):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = i < numel
    x = tl.zeros((SIZE,), tl.float32)
    if READS:
        x = beta * tl.load(W + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_U:
        x += alpha * tl.load(U + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_G:
        factor = tl.load(d + (i // stride) % columns, mask=inside, other=0.0)
        x += gamma * factor * tl.load(G + i, mask=inside, other=0.0).to(tl.float32)
    drawn = tl.randint(seed, i).to(tl.int32, bitcast=True)
    noise = drawn & ((1 << DROPPED) - 1)
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    kept = tl.where(finite, ((bits + noise) >> DROPPED) << DROPPED, bits)
    if DROPPED == 16:  # bf16 is the upper half of the bits; one NaN for all
        half = tl.where(x == x, kept >> 16, 0x7FC0).to(tl.int16)
        tl.store(W + i, half.to(tl.bfloat16, bitcast=True), mask=inside)
    else:  # below 2^-14 fp16 has a fixed grid of 2^-24
        uniform = ((drawn >> 8) & 0xFFFFFF).to(tl.float32) * (1.0 / 16777216.0)
        scaled = x * 16777216.0
        below = tl.floor(scaled)
        small = (below + (uniform < scaled - below).to(tl.float32)) * (1.0 / 16777216.0)
        rounded = tl.where(tl.abs(x) < 0.00006103515625, small, kept.to(tl.float32, bitcast=True))
        tl.store(W + i, rounded.to(tl.float16), mask=inside)


def launch(
    W: Tensor,
    beta: float,
    U: Tensor | None,
    alpha: float,
    G: Tensor | None,
    d: Tensor | None,
    gamma: float,
    seed: int,
    dropped: int,
) -> None:
    """See `fused.rewrite_`.

    Raises:
        ValueError: for an operand that does not lie as the weight does.
    """
    for X in (U, G):
        if X is not None and (X.shape != W.shape or X.stride() != W.stride()):
            raise ValueError(f"an operand lies as {tuple(X.stride())}, the weight as {tuple(W.stride())}")
    # element i of the memory is in column (i // stride) % columns
    columns, stride = W.shape[-1], W.stride(-1)
    _kernel[(triton.cdiv(W.numel(), BLOCK),)](
        W,
        W if U is None else U,
        W if G is None else G,
        W if d is None else d.contiguous(),
        beta,
        alpha,
        gamma,
        seed & 0x7FFFFFFFFFFFFFFF,
        W.numel(),
        columns,
        stride,
        READS=beta != 0.0,
        HAS_U=U is not None,
        HAS_G=G is not None,
        DROPPED=dropped,
        SIZE=BLOCK,
    )
