"""GoLore (arXiv 2410.11289): dominant at first, uniform on the Stiefel manifold from step `switch` on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from itertools import count
from math import ceil
from typing import Any

import torch
from torch import Tensor

from references.base import LowRank, aligned, dominant
from references.case import Case, Entry


def uniform_stiefel(Z: Tensor) -> Tensor:
    """Z (Z^T Z)^(-1/2), uniform on the Stiefel manifold for Gaussian Z."""
    U, _, Vh = torch.linalg.svd(Z, full_matrices=False)
    return U @ Vh


@dataclass
class GoLore(LowRank):
    """With moments=Momentum(whole=True) it is golore_msgd; scale 1 as in its pretraining scripts."""

    _: KW_ONLY
    switch: int
    draw: Callable[[int, int], Tensor]  # (m, r) -> orthonormal (m, r)
    on_refresh: str = "rotate"  # M <- P_new^T P_old M, V stays

    def refresh(self, G: Tensor) -> None:
        if self.steps >= self.switch:  # the flag is looked at at refreshes only
            self.choose = lambda G, r, old: aligned(self.draw(G.shape[0], r), old)
        super().refresh(G)


def switched(case: Case) -> dict[str, Any]:
    numbers, o = count(), case.options  # one number for every basis, drawn or not

    def choose(G: Tensor, r: int, old: Tensor | None) -> Tensor:
        next(numbers)
        return dominant(G, r, old)

    switch = ceil(o["switch_at"] * o["total_steps"]) if o["switch_at"] < 1 else 2**62
    return {"switch": switch, "choose": choose, "draw": lambda m, r: case.stiefel(next(numbers), m, r)}


REFERENCES = {("subspace", "golore"): Entry(GoLore, switched)}
