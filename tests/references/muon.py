"""Muon in a subspace: SUMO (arXiv 2505.24749, Algorithm 1), with the size of Muon is Scalable (arXiv 2502.16982)."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from references.case import Entry


class Muon:
    """M <- b1 M + R, U S V^T = M, N = 0.2 sqrt(max(m, n)) U V^T; nesterov: of b1 M + R. No bias correction."""

    M: Any = 0.0

    def __init__(self, nesterov: bool = False) -> None:
        self.nesterov = nesterov

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        self.M = h.beta1 * self.M + R
        return 0.2 * sqrt(max(h.W.shape)) * polar(h.beta1 * self.M + R if self.nesterov else self.M), 1.0

    def mean(self, h: Any) -> Tensor:
        return (1 - h.beta1) * self.M

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        if how != "keep":  # SUMO carries it along
            self.M = C @ self.M


def polar(X: Tensor) -> Tensor:
    """U V^T of the singular vectors whose value is not zero to fp32, in which the runs beside this one are."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U * S.gt(1e-6 * S[0])) @ Vh


# About a sketch, which is no projector, the error that is fed back grows from step to step, and M's condition to 1e8.
REFERENCES = {
    ("moments", "muon"): Entry(
        fields=lambda case: {"moments": Muon(case.options["nesterov"])},
        without=frozenset({"sketch", "error_feedback"}),
    )
}
