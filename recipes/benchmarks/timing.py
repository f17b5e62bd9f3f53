"""Clocks, and what a step allocates for a moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


Call = Callable[[], object]

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = CLOCKS["wall"]


def use_clock(name: str) -> None:
    """Read the wall clock or, for one thread on a machine that others use, the processor time of this process."""
    global _clock
    _clock = CLOCKS[name]


@dataclass
class Samples:
    """Milliseconds of one thing, measured several times."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median; nan if nothing was measured."""
        return statistics.median(self.values) if self.values else float("nan")

    @property
    def p99(self) -> float:
        """The 99th percentile, interpolated."""
        return self.quantile(0.99)

    @property
    def spread(self) -> str:
        """The quartiles, for people."""
        return f"{self.quantile(0.25):.1f}-{self.quantile(0.75):.1f}" if self.values else "-"

    def quantile(self, q: float) -> float:
        """Return a quantile, interpolated."""
        return float(torch.tensor(self.values, dtype=torch.float64).quantile(q)) if self.values else float("nan")


def milliseconds(call: Call, device: str, clock: Callable[[], float] | None = None) -> float:
    """Return how long one call takes, the device's queue included, by the clock in use or another one."""
    now = clock or _clock
    synchronize(device)
    start = now()
    call()
    synchronize(device)
    return 1e3 * (now() - start)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def ratio(a: Samples, b: Samples) -> tuple[float, str]:
    """Return the median of the ratios a / b, round by round of an interleaved run, and their quartiles.

    Round by round both have seen the same disturbances, also where one of them was stopped early.
    """
    pairs = Samples([x / y for x, y in zip(a.values, b.values, strict=False)])
    low, high = pairs.quantile(0.25), pairs.quantile(0.75)
    return pairs.median, f"quartiles {low:.2f}-{high:.2f}, n = {len(pairs.values)}"


def transient_bytes(call: Call, device: str) -> int:
    """Return the most that a call holds above what was there before it.

    On the CPU the profiler reports every allocation of torch's allocator, not what LAPACK allocates for itself.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak


def held_bytes(things: Iterable[object]) -> int:
    """Return the bytes of all tensors in nested containers and objects, each storage once."""
    seen: dict[int, int] = {}
    done: set[int] = set()
    stack = list(things)
    while stack:
        thing = stack.pop()
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            seen[storage.data_ptr() or id(thing)] = storage.nbytes()
        elif id(thing) not in done:
            done.add(id(thing))
            if isinstance(thing, dict):
                stack += thing.values()
            elif isinstance(thing, (list, tuple)):
                stack += thing
            elif hasattr(thing, "__dict__"):
                stack += vars(thing).values()
    return sum(seen.values())
