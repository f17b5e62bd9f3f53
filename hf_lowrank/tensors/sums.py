"""Computations that ask for sums over processes, and how one process answers itself."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from torch import Tensor


T = TypeVar("T")
Summing = Generator[Tensor, Tensor, T]
"""A computation that yields partial sums, is sent the whole ones, and returns a T."""


def alone(work: Summing[T]) -> T:
    """Run a computation where this process holds everything: every sum is whole already."""
    try:
        total = next(work)
        while True:
            total = work.send(total)
    except StopIteration as stop:
        result: T = stop.value
        return result
