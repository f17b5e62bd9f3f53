"""Moments of a shortened last axis: GWT (arXiv 2501.07237) and FOAM (arXiv 2512.07112). No subspace, no transposing.

FOAM is that of its code, but for `square_of_mean`, which the code does not have.
A last axis that 2^level does not divide is filled up with zeros at its end; what was added is cropped from the update.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import log2, sqrt
from typing import Any

import torch
from torch import Tensor

from references.base import Matrix, direction
from references.case import Case, Entry


def padded(X: Tensor, level: int) -> Tensor:
    return torch.nn.functional.pad(X, (0, -X.shape[-1] % 2**level))


def haar(X: Tensor) -> tuple[Tensor, Tensor]:
    """a = (x0 + x1) / sqrt 2, d = (x0 - x1) / sqrt 2."""
    return (X[:, ::2] + X[:, 1::2]) / sqrt(2), (X[:, ::2] - X[:, 1::2]) / sqrt(2)


def inverse_haar(a: Tensor, d: Tensor) -> Tensor:
    return torch.stack([(a + d) / sqrt(2), (a - d) / sqrt(2)], dim=-1).flatten(1)


@dataclass
class OwnAxis(Matrix):
    _: KW_ONLY
    level: int = 2
    scale: float = 0.25
    transposed: bool | None = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.M: Any = 0.0
        self.V: Any = 0.0


@dataclass
class GWT(OwnAxis):
    """Adam on the approximation A; the details, with no momentum, borrow its denominator."""

    _: KW_ONLY
    limiter: float = 1.01

    def update(self, G: Tensor) -> Tensor:
        A, details = padded(G, self.level), []
        for _ in range(self.level):
            A, D = haar(A)
            details.append(D)  # finest first
        self.M = self.beta1 * self.M + (1 - self.beta1) * A
        self.V = self.beta2 * self.V + (1 - self.beta2) * A * A
        N, c = direction(self.M, self.V, self.steps + 1, self)
        one, _ = direction(torch.ones_like(A), self.V, self.steps + 1, self)  # 1 / denominator
        limited = self.limit(N, limiter=self.limiter)
        L = float(N.norm() / limited.norm()) if N.norm() > 0 else 1.0
        X = limited
        for D in reversed(details):
            X = inverse_haar(X, D * one / L)
            one = one.repeat_interleave(2, dim=1)  # for the next finer level
        return c * self.scale * X[:, : G.shape[1]]


def fold(X: Tensor, level: int) -> Tensor:
    """Mean of blocks of 2^level neighbours."""
    return X.reshape(len(X), -1, 2**level).mean(-1)


def unfold(X: Tensor, level: int) -> Tensor:
    return X.repeat_interleave(2**level, dim=1)


@dataclass
class FOAM(OwnAxis):
    """Adam on block means, the deviation from the mean added to both moments."""

    _: KW_ONLY
    residual: float = 1.0  # c
    square_of_mean: bool = False  # fold(g)^2 as summaries of the paper have it, else fold(g^2) as the code

    def update(self, G: Tensor) -> Tensor:
        X, l, c = padded(G, self.level), self.level, self.residual  # noqa: E741
        mean = fold(X, l)
        self.M = self.beta1 * self.M + (1 - self.beta1) * mean
        self.V = self.beta2 * self.V + (1 - self.beta2) * (mean**2 if self.square_of_mean else fold(X * X, l))
        rest = X - unfold(mean, l)
        N, c_t = direction(unfold(self.M, l) + c * rest, unfold(self.V, l) + (c * rest) ** 2, self.steps + 1, self)
        return c_t * self.scale * N[:, : G.shape[1]]


def level(case: Case) -> int:
    return round(-log2(case.options["rank"]))


HAAR = Entry(GWT, lambda case: {"transposed": False, "level": level(case), "limiter": case.options["limiter"]})
FOLD = Entry(
    FOAM,
    lambda case: {
        "transposed": False,
        "level": level(case),
        "residual": case.options["residual_scale"],
        "square_of_mean": case.options["fold_of"] == "gradient",
    },
)
REFERENCES = {
    ("subspace", "haar"): HAAR,
    ("reconstruction", "details"): HAAR,
    ("subspace", "fold"): FOLD,
    ("moments", "folded_adam"): FOLD,
    ("reconstruction", "unfold"): FOLD,
}
