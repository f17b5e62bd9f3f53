"""One kernel that decays a weight of low precision, adds its step and rounds the sum, in Triton.

In torch's own operations that is eight passes over an fp32 image of the weight; here all is read and written once.
`rounding.round_` is the law that it follows and what does the work anywhere else.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


logger = logging.getLogger(__name__)

DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Bits of an fp32 mantissa that a type cannot hold."""


def fits(W: Tensor) -> bool:
    """Tell whether the kernel writes this weight, (m, n) or (n,): of low precision, in one piece, on CUDA."""
    if not runs_on(W.device) or W.dtype not in DROPPED or W.dim() not in (1, 2) or W.numel() >= 2**31:
        return False
    return W.is_contiguous() or (W.dim() == 2 and W.mT.is_contiguous())


@lru_cache
def runs_on(device: torch.device) -> bool:
    """Tell whether the kernel runs on a device: tried once, on numbers that it must leave as they are."""
    if device.type != "cuda":
        return False
    try:
        W = torch.arange(2000, dtype=torch.float32, device=device).sub_(1000).bfloat16()
        U, kept = W.float(), W.clone()
        rewrite_(W, 0.0, U, 1.0, None, None, 0.0, 1)
        good = torch.equal(W, kept)
    except Exception as error:  # whatever Triton, its compiler or the driver may raise: there is another way
        logger.warning("the fused rounding kernel does not run here (%s): torch's own operations are used", error)
        return False
    if not good:
        logger.warning("the fused rounding kernel gives wrong numbers here: torch's own operations are used")
    return good


SCHEMA = "(Tensor(a!) W, float beta, Tensor? U, float alpha, Tensor? G, Tensor? d, float gamma, int seed) -> ()"
"""Written out: older versions of torch cannot read it off annotations that are text."""


@torch.library.custom_op("hf_lowrank::rewrite_", mutates_args={"W"}, schema=SCHEMA)
def rewrite_(
    W: Tensor,
    beta: float,
    U: Tensor | None,
    alpha: float,
    G: Tensor | None,
    d: Tensor | None,
    gamma: float,
    seed: int,
) -> None:
    """W <- round(beta W + alpha U + gamma G diag(d)), stochastically.

    Args:
        W: bf16 or fp16, (m, n) in one piece, or (n,).
        beta: factor of W; with 0 it is not read.
        U: fp32 or bf16, lying as W does, or None.
        alpha: factor of U.
        G: gradient (m, n) of any type, lying as W does, or None.
        d: fp32 (n,), factor of every column of G.
        gamma: factor of G diag(d).
        seed: of what is drawn; the same seed gives the same numbers on one type of device.
    """
    from hf_lowrank.tensors.fused_kernel import launch

    launch(W, beta, U, alpha, G, d, gamma, seed, DROPPED[W.dtype])


@rewrite_.register_fake
def _(*args: Any) -> None:
    return None
