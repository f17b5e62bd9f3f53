"""LDAdam (arXiv 2410.16103): tracking, transport and error feedback at every step; the steps of its Algorithm 1."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from reference import dominant
from references.base import Matrix, aligned
from torch import Tensor


@dataclass
class LDAdam(Matrix):
    """Every step is a refresh."""

    _: KW_ONLY
    rank: int
    rho: float = 0.908
    error_feedback: bool = True
    beta1: float = 0.908
    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank = min(self.rank, *self.W.shape)
        self.P: Tensor | None = None
        self.M: Any = 0.0
        self.V: Any = 0.0
        self.E = torch.zeros_like(self.W)

    def update(self, G: Tensor) -> Tensor:
        t, b1, b2 = self.steps, self.beta1, self.beta2
        c1, c2 = 1 - b1**t, 1 - b2**t
        a = G + self.E  # 1
        old, M, V = self.P, self.M, self.V
        if old is None:  # 2, t = 0: P_old = 0, M = 0
            P = dominant(a, self.rank, None)
            R, lost = P.T @ a, 0.0
        else:
            b = self.rho * old @ M / c1 + (1 - self.rho) * a  # 2
            P = aligned(torch.linalg.qr(b @ (b.T @ old))[0], old)
            R = P.T @ a  # 3
            Q = P.T @ old  # 4
            moved = Q @ M
            lost = b1 / (1 - b1) * (old @ M - P @ moved)  # 5
            V = c2 * ((Q * Q) @ (V / c2 - (M / c1) ** 2) + (moved / c1) ** 2).abs()  # 6
            M = moved
        if self.error_feedback:
            self.E = (a - P @ R) + lost  # 5
        self.M = b1 * M + (1 - b1) * R  # 7
        self.V = b2 * V + (1 - b2) * R * R
        self.P = P
        c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        return self.scale * P @ ((self.M / c1) / ((self.V / c2).sqrt() + self.eps))  # 8
