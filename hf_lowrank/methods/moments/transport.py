"""What happens to moments when the basis changes."""

from __future__ import annotations

from math import inf, sqrt

import torch
from torch import Tensor

from hf_lowrank.methods.context import Context


def rotated_variance(C: Tensor, M: Tensor, CM: Tensor, V: Tensor, *, complete: bool, ctx: Context) -> Tensor:
    """Transport the second moment: c2 |(C∘C)(V/c2 - (M/c1)^2) + (C M / c1)^2|, c1 = 1 - b1^t, c2 = 1 - b2^t.

    The variance around the mean is rotated by the squared entries of C, the mean exactly. Rows of C∘C sum to less than
    one where the new basis leaves the old span; `complete` fills the missing share with the mean of V over the old
    directions, per column.

    Args:
        C: (..., r, r) change of basis P_new^T P_old.
        M: (..., r, n) first moment in the old basis.
        CM: (..., r, n) the same in the new one.
        V: (..., r, n) second moment in the old basis.
        complete: fill the lost mass.
        ctx: the step; t is the number of updates that the moments have had.

    References:
        LDAdam, arXiv 2410.16103, Algorithm 1 (projection-aware update), as in SubTrack++, arXiv 2502.01586, eqs. 8-9.
        The completion is ours.
    """
    t = ctx.moment_step - 1
    c1, c2 = 1 - ctx.beta1**t, 1 - ctx.beta2**t
    if t == 0:  # nothing to carry yet
        return torch.zeros_like(V)
    squares = C.square()
    rotated = (squares @ (V / c2 - (M / c1).square()) + (CM / c1).square()).abs_().mul_(c2)
    if complete:
        lost = (1 - squares.sum(-1, keepdim=True)).clamp_min_(0)
        rotated += lost * V.mean(-2, keepdim=True)
    return rotated


def largest_direction(beta1: float, beta2: float) -> float:
    """Return B such that |M| <= B sqrt(V) for any sequence of gradients: B^2 = (1-b1)^2 / ((1-b2) (1 - b1^2/b2)).

    By Cauchy-Schwarz; a pair within the bound stays within it. There is no bound, and infinity is returned, for b1^2
    >= b2.
    """
    rest = 1 - beta1**2 / beta2 if beta2 > 0 else 0.0
    return (1 - beta1) / sqrt((1 - beta2) * rest) if rest > 0 else inf
