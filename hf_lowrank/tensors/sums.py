"""Rules that may ask for sums over processes.

A rule is a function or a generator. Where a matrix is split over processes some rules need a sum over all of its
columns or rows: they yield `Sum(partial, over="columns")` and are sent the whole sum. (`Max` asks for the largest.) A
rule that asks for nothing is a plain function. What the axes are is said where the rule is declared.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor


T = TypeVar("T")


class Sum(NamedTuple):
    """What a rule yields: the sum of `partial` over all processes that hold other pieces of the axis `over`."""

    partial: Tensor
    over: Literal["columns", "rows"]


class Max(NamedTuple):
    """The largest of every element of `partial` over all processes that hold other pieces of the axis `over`."""

    partial: Tensor
    over: Literal["columns", "rows"]


Asking = Generator[Sum | Max, Tensor, T]
"""A rule that asks: it yields sums, is sent the whole ones, and returns a T."""
Rule: TypeAlias = T | Asking[T]
"""What a rule returns: a T, or a generator that asks first."""


def whole_columns(X: Tensor, start: int, n: int) -> Asking[Tensor]:
    """Return all n columns of a matrix of which this process holds those of X (..., r, k), from `start` on.

    Every process fills in its own, and the sum is exact: it adds zeros.
    """
    k = X.shape[-1]
    if k == n:
        return X
    padded = torch.nn.functional.pad(X, (start, n - start - k))
    whole = yield Sum(padded, over="columns")
    return whole


def alone(rule: Rule[T]) -> T:
    """Finish a rule where this process holds everything: every sum is whole already."""
    if not isinstance(rule, Generator):
        return rule
    total = None
    try:
        while True:
            total = rule.send(total).partial  # type: ignore[arg-type]
    except StopIteration as stop:
        result: T = stop.value
        return result
