"""Q-GaLore (arXiv 2407.08296): a basis stored in few bits, and refreshes that become rare while it does not change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from references.base import LowRank
from references.case import Case, Entry


def intervals(
    overlaps: Sequence[float], gap: int, *, threshold: float = 0.4, keep: int = 5, cap: int = 16
) -> list[int]:
    """Steps to wait after each refresh that has a predecessor; overlap = ||P_old^T P_new||_F^2 / r.

    Double after `keep` overlaps with a mean of at least the threshold, up to cap x gap. The way back: an overlap under
    the threshold halves, down to gap, whatever the mean. A change of the interval starts the count anew.
    """
    interval, recent, out = gap, [], []
    for overlap in overlaps:
        recent = [*recent, overlap][-keep:]
        before = interval
        if overlap < threshold:
            interval = max(interval // 2, gap)
        elif len(recent) == keep and sum(recent) / keep >= threshold:
            interval = min(2 * interval, cap * gap)
        if interval != before:
            recent = []
        out.append(interval)
    return out


@dataclass
class QGaLore(LowRank):
    """`store` gives the basis as it comes back from its few bits; all that follows uses that one."""

    _: KW_ONLY
    store: Callable[[Tensor], Tensor]
    threshold: float = 0.4
    keep: int = 5
    cap: int = 16
    scale: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.overlaps: list[float] = []

    def transport(self, C: Tensor) -> None:
        self.overlaps.append(float(C.norm() ** 2) / self.rank)
        super().transport(C)

    def refresh(self, G: Tensor) -> None:
        super().refresh(G)
        assert self.P is not None
        self.P = self.store(self.P)

    def interval(self) -> int:
        lazy = intervals(self.overlaps, self.gap, threshold=self.threshold, keep=self.keep, cap=self.cap)
        return lazy[-1] if lazy else self.gap


def four_bits(P: Tensor) -> Tensor:
    """15 levels from -absmax to absmax of every 128 numbers in the order of the rows; under 4096 numbers as it is."""
    if P.numel() < 4096:
        return P
    blocks = P.reshape(-1, 128)
    absmax = blocks.abs().amax(1, keepdim=True)
    return (torch.round(7 * blocks / absmax) / 7 * absmax).reshape(P.shape)


def lazy(case: Case) -> dict[str, Any]:
    o = case.options
    store = four_bits if o.get("basis_format") == "4bit" else lambda P: P
    return {"store": store, "threshold": o["threshold"], "keep": o["queue_size"], "cap": o["longest"]}


REFERENCES = {("subspace", "lazy"): Entry(QGaLore, lazy)}
