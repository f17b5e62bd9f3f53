"""When matrices are refreshed: the work of a refresh, and how refreshes are spread over the interval."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from types import MappingProxyType
from typing import TypeVar

import torch
from torch import Tensor


T = TypeVar("T")


def owners(costs: list[float], world: int, known: Mapping[int, int] = MappingProxyType({})) -> list[int]:
    """Return who does what: the costliest first, each to the process with the least so far; the same everywhere.

    Args:
        costs: of every piece of work.
        world: how many processes there are.
        known: by place, who does what has been given out before.
    """
    load = [0.0] * world
    owner = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (i not in known, -costs[i], i)):
        owner[i] = known[i] if i in known else min(range(world), key=lambda rank: (load[rank], rank))
        load[owner[i]] += costs[i]
    return owner


def waves(items: list[T], owner: list[int], size: int = 1) -> list[list[tuple[T, int]]]:
    """Split work into waves in which every process owns `size` items at most, so that no more is held at once."""
    queues: dict[int, list[tuple[T, int]]] = {}
    for item, rank in zip(items, owner, strict=True):
        queues.setdefault(rank, []).append((item, rank))
    rounds = [[pair for pair in wave if pair is not None] for wave in zip_longest(*queues.values())]
    return [sum(rounds[i : i + size], []) for i in range(0, len(rounds), size)]


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
