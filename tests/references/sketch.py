"""FLora (arXiv 2402.03293): Adafactor on the whole gradient, its first moment kept in a Gaussian sketch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from itertools import count
from typing import Any

from torch import Tensor

from references.base import Matrix
from references.case import Case, Entry
from references.factored import Factored, clipped


@dataclass
class FLora(Matrix):
    """sketch(k): A (r, m) of the k-th interval, A_ij ~ N(0, 1/r); down(X) = A X, up(Y) = A^T Y.

    At the first step of an interval the momentum is read through the new sketch (Algorithm 2), or with `late`, as
    flora-opt does it, through the old one.
    """

    _: KW_ONLY
    gap: int  # kappa
    sketch: Callable[[int], Tensor]
    late: bool = False
    decay: float = 0.8  # of b2 = 1 - t^-decay
    threshold: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.v, self.k, self.due = Factored(), 0, self.gap
        self.A, self.M = self.sketch(0).double(), None

    def update(self, G: Tensor) -> Tensor:
        t, b1 = self.steps + 1, self.beta1
        u = G / self.v.update(G * G + 1e-30, 1 - t**-self.decay).sqrt()
        M: Any = 0 * self.A @ u if self.M is None else self.M
        old = self.A
        moved = M
        if self.steps == self.due:
            self.k, self.due = self.k + 1, self.due + self.gap
            self.A = self.sketch(self.k).double()
            moved = self.A @ (old.T @ M)
        U = (1 - b1) * u + b1 * (old.T @ M if self.late else self.A.T @ moved)  # the momentum before this step
        self.M = b1 * moved + (1 - b1) * self.A @ u
        return self.scale * clipped(U, self.threshold)


def sketched(case: Case) -> dict[str, Any]:
    numbers = count()
    return {"choose": lambda G, r, old: case.sketch(next(numbers), len(G), r)}


def flora(case: Case) -> dict[str, Any]:
    o, m, r = case.options, case.m, case.rank
    adafactor = {"decay": o["decay_rate"], "threshold": o["clip_threshold"]}
    return {"sketch": lambda k: case.sketch(k, m, r).T, **adafactor}


REFERENCES = {
    ("subspace", "sketch"): Entry(fields=sketched),
    ("moments", "sketched_momentum"): Entry(FLora, flora),
    ("reconstruction", "flora"): Entry(FLora, flora),
}
