"""Times and peaks of calls on a device, and what device it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.tensors import fused


@dataclass(frozen=True)
class Bench:
    """Where and how large."""

    device: torch.device
    quick: bool

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, call: Callable[[], object], repeats: int = 10) -> float:
        """Return the median of several calls, each with the device's queue empty before and after, after two more."""
        times = []
        for i in range((1 if self.quick else repeats) + 2):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            if i >= 2:
                times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def peak(self, call: Callable[[], object]) -> int | None:
        """Return the bytes that a call holds at most above those there were; None where it is not known."""
        if self.device.type != "cuda":
            call()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Return random numbers on the device."""
        return (torch.randn(*shape, device=self.device) * scale).to(dtype)


def environment(bench: Bench) -> dict[str, Any]:
    """Name the card and the versions."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": str(bench.device), "quick": bench.quick}
    if bench.device.type == "cuda":
        found |= {"card": torch.cuda.get_device_name(bench.device), "cuda": torch.version.cuda}
        found["fused write"] = fused.runs_on(bench.device)
    return found
