"""SinkGD (arXiv 2502.06742, Algorithm 3) and SWAN (arXiv 2412.13148): what can be done with one gradient, or with a
momentum in its place."""

from __future__ import annotations

from math import sqrt
from typing import Any

from torch import Tensor

from references.case import Case, Entry
from references.muon import POLAR_EXPRESS, iterated, polar, rounding


class Sinkhorn:
    """Columns and rows to unit RMS in turn."""

    def __init__(self, iterations: int = 5) -> None:
        self.iterations = iterations

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        for _ in range(self.iterations):
            R = R / R.square().mean(0, keepdim=True).sqrt()
            R = R / R.square().mean(1, keepdim=True).sqrt()
        return R, 1.0

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        pass


class Whitened(Sinkhorn):
    """Every row of the short side standardised, then 0.2 sqrt(max(m, n)) times the polar factor."""

    def __init__(self, how: str, steps: int) -> None:
        self.how, self.steps = how, steps

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        side = 0 if R.shape[0] > R.shape[1] else 1  # the paper has m <= n, and standardises over n
        X = R - R.mean(side, keepdim=True)
        X = X / X.square().mean(side, keepdim=True).sqrt()
        if self.how == "exact":
            white = polar(X)
        elif self.how == "newton_schulz":
            white = iterated(X / X.norm(), [(3.4445, -4.7750, 2.0315)] * self.steps)
        else:
            white = iterated(X / (1.01 * X.norm()), POLAR_EXPRESS[: self.steps])
        return 0.2 * sqrt(max(h.W.shape)) * white, 1.0


class RMNP:
    """RMNP (arXiv 2603.20527): every column of the momentum to an RMS of 0.2."""

    M: Any = 0.0

    def __init__(self, nesterov: bool) -> None:
        self.nesterov = nesterov

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        self.M = h.beta1 * self.M + (1 - h.beta1) * R
        X = h.beta1 * self.M + (1 - h.beta1) * R if self.nesterov else self.M
        return 0.2 * X / X.square().mean(0, keepdim=True).sqrt(), 1.0

    def mean(self, h: Any) -> Tensor:
        return self.M

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        if how != "keep":
            self.M = C @ self.M


def rmnp(case: Case) -> dict[str, Any]:
    return {"moments": RMNP(case.options["nesterov"])}


def whitened(case: Case) -> dict[str, Any]:
    return {"moments": Whitened(case.options["orthogonalize"], case.options["ns_steps"])}


def tolerance(case: Case) -> float:
    """The rows of a square X add up to nothing: an iteration of slope 1000 at zero makes 1e-7 of that 1e-4."""
    return rounding(case) if case.options["orthogonalize"] != "polar_express" else 1e-3


REFERENCES = {
    ("moments", "sinkhorn"): Entry(fields=lambda case: {"moments": Sinkhorn(case.options["iterations"])}),
    ("moments", "rmnp"): Entry(fields=rmnp),
    ("moments", "whitened"): Entry(fields=whitened, tolerance=tolerance),
}
