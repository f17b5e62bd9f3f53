"""Rules that may ask for sums over processes.

A rule is a function or a generator. Where a matrix is split over processes some rules need a sum over all of its
columns or rows: they yield `Sum(partial, over="columns")` and are sent the whole sum. A rule that asks for nothing is
a plain function. What the axes are is said where the rule is declared.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Literal, NamedTuple, TypeAlias, TypeVar

from torch import Tensor


T = TypeVar("T")


class Sum(NamedTuple):
    """What a rule yields: the sum of `partial` over all processes that hold other pieces of the axis `over`."""

    partial: Tensor
    over: Literal["columns", "rows"]


Asking = Generator[Sum, Tensor, T]
"""A rule that asks: it yields sums, is sent the whole ones, and returns a T."""
Rule: TypeAlias = T | Asking[T]
"""What a rule returns: a T, or a generator that asks first."""


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
