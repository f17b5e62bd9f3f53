"""Muon: of the whole gradient (torch.optim.Muon), or in a subspace; SUMO (arXiv 2505.24749, Algorithm 1).

The size is that of Muon is Scalable (arXiv 2502.16982) or of the original; NorMuon: arXiv 2510.05491.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from references.base import LowRank
from references.case import Case, Entry


POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)


class Muon:
    """M <- b1 M + (1 - b1) R, N = factor U V^T of M, or (nesterov) of b1 M + (1 - b1) R. No bias correction."""

    M: Any = 0.0

    def __init__(
        self, how: str = "exact", steps: int = 5, nesterov: bool = False, factor: float | None = None
    ) -> None:
        self.how, self.steps, self.nesterov, self.factor = how, steps, nesterov, factor

    def orthogonal(self, R: Tensor, h: Any) -> Tensor:
        self.M = h.beta1 * self.M + (1 - h.beta1) * R
        X = h.beta1 * self.M + (1 - h.beta1) * R if self.nesterov else self.M
        if self.how == "exact":
            return polar(X)
        if self.how == "newton_schulz":
            return iterated(X / X.norm(), [(3.4445, -4.7750, 2.0315)] * self.steps)
        return iterated(X / (1.01 * X.norm()), POLAR_EXPRESS[: self.steps])

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        factor = 0.2 * sqrt(max(h.W.shape)) if self.factor is None else self.factor
        return factor * self.orthogonal(R, h), 1.0

    def mean(self, h: Any) -> Tensor:
        return self.M

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        if how != "keep":  # SUMO carries it along
            self.M = C @ self.M


class Sumo(LowRank):
    """Block 4: W <- W - lr (G - Q (G^ - O)) - lr wd W with G^ = Q^T G."""

    def combine(self, G: Tensor, R: Tensor, N: Tensor, c: float) -> Tensor:
        return G - self.P @ (R - c * self.scale * N)


class NorMuon(Muon):
    """v_j: running mean of the mean square of column j of O (a neuron); N = 0.2 sqrt(numel) O^ / ||O^||."""

    v: Any = 0.0

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        O = self.orthogonal(R, h)  # noqa: E741
        self.v = h.beta2 * self.v + (1 - h.beta2) * O.square().mean(0)
        O = O / (self.v.sqrt() + h.eps)  # noqa: E741
        return 0.2 * sqrt(O.numel()) * O / O.norm(), 1.0


def polar(X: Tensor) -> Tensor:
    """U V^T of the singular vectors whose value is not zero to fp32, in which the runs beside this one are."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    return (U * S.gt(1e-6 * S[0])) @ Vh


def iterated(X: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """Singular values s <- a s + b s^3 + c s^5 for every triple."""
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return (U * s) @ Vh


def factor(case: Case) -> float | None:
    outputs, inputs = case.shape
    return None if case.options["adjust_lr"] == "match_rms_adamw" else max(1.0, outputs / inputs) ** 0.5


def muon(case: Case) -> dict[str, Any]:
    o = case.options
    return {"moments": Muon(o["orthogonalize"], o["ns_steps"], o["nesterov"], factor(case))}


def normuon(case: Case) -> dict[str, Any]:
    o = case.options
    return {"moments": NorMuon(o["orthogonalize"], o["ns_steps"], o["nesterov"])}


def rounding(case: Case) -> float:
    """Newton-Schulz is done in bf16, which rounds each product to 2^-9; it is a polynomial of slope 500 at zero."""
    return 3e-2 if case.options["orthogonalize"] == "newton_schulz" else 1e-5


REFERENCES = {
    ("moments", "muon"): Entry(fields=muon, tolerance=rounding),
    ("moments", "normuon"): Entry(fields=normuon, tolerance=rounding),
    ("reconstruction", "residual"): Entry(Sumo),
}
