"""When matrices are refreshed: the work of a refresh, and how refreshes are spread over the interval."""

from __future__ import annotations

import torch
from torch import Tensor


def staggered_intervals(costs: list[float], gap: int, together: int = 1) -> list[int]:
    """Return for every matrix the first interval, 1 .. gap, that spreads later refreshes evenly by cost.

    Args:
        costs: work of every refresh.
        gap: steps between refreshes of one matrix.
        together: how many matrices are refreshed at once: one per process.
    """
    intervals, done, total = [], 0.0, sum(costs)
    for start in range(0, len(costs), together):
        some = costs[start : start + together]
        done += sum(some)
        intervals += [max(1, round(gap * done / total))] * len(some)
    return intervals


def refresh_cost(weight: Tensor) -> float:
    """Estimate the work of a refresh: the Gram product on the short side dominates."""
    *batch, rows, columns = weight.shape
    return torch.Size(batch).numel() * float(min(rows, columns)) ** 2 * max(rows, columns)
