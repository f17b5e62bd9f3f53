"""LDAdam (arXiv 2410.16103): tracking, transport and error feedback at every step; the steps of its Algorithm 1.

And its error feedback alone, about any basis and any first moment.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from references.base import LowRank, Matrix, aligned, direction, dominant
from references.case import Entry


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
        N, c = direction(self.M, self.V, t + 1, self)
        return self.scale * c * P @ N  # 8


def mean(h: LowRank) -> Any:
    """The first moment as a running mean; a rule that keeps a sum says what its mean is."""
    return getattr(h.moments, "mean", lambda h: h.moments.M)(h)


@dataclass
class ErrorFeedback(LowRank):
    """E <- (G + E) - P R, R = P^T (G + E), for any basis; at a refresh E <- E + b1 / (1 - b1) (P_old M_old - P M)."""

    _: KW_ONLY
    feedback: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.E = torch.zeros_like(self.W)

    def absorb(self, G: Tensor) -> Tensor:
        return super().absorb(G + self.E)

    def momentum(self) -> Any:
        M = mean(self)
        return self.P @ M if torch.is_tensor(M) else 0.0

    def move_to(self, new: Tensor) -> None:
        before = self.momentum()
        super().move_to(new)
        if self.feedback:
            self.E = self.E + self.beta1 / (1 - self.beta1) * (before - self.momentum())

    def combine(self, G: Tensor, R: Tensor, N: Tensor, c: float) -> Tensor:
        if self.feedback:
            self.E = G - self.P @ R
        return super().combine(G, R, N, c)


@dataclass
class BlockPower(LowRank):
    """P <- QR(b b^T P), b = rho P M / c1 + (1 - rho) G, for any first moment M; the first basis is dominant."""

    _: KW_ONLY
    rho: float = 0.908

    def refresh(self, G: Tensor) -> None:
        if self.P is None:
            return self.move_to(dominant(G, self.rank, None))
        c1 = 1 - self.beta1**self.t if self.t else 1.0
        b = self.rho * self.P @ mean(self) / c1 + (1 - self.rho) * G
        self.move_to(aligned(torch.linalg.qr(b @ (b.T @ self.P))[0], self.P))


REFERENCES = {
    ("subspace", "block_power"): Entry(BlockPower, lambda case: {"rho": case.options["rho"]}),
    ("reconstruction", "error_feedback"): Entry(
        ErrorFeedback, lambda case: {"feedback": case.options["error_feedback"] != "off"}
    ),
}
