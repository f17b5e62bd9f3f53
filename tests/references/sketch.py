"""FLora (arXiv 2402.03293): Adafactor on the whole gradient, its first moment kept in a Gaussian sketch.

The sketch and its change every kappa steps are the paper's; the step is that of its code (flora-opt 0.0.3, for torch).
"""

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

    The sketch changes at the updates kappa, 2 kappa, ... counted from 1. Such an update reads the momentum through the
    old one; M <- down_new(up_old(M)), and it takes up the update's own u through the new one.
    """

    _: KW_ONLY
    gap: int  # kappa
    sketch: Callable[[int], Tensor]
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
        U = (1 - b1) * u + b1 * self.A.T @ M  # the momentum before this step
        if t == self.due:
            old, self.k, self.due = self.A, self.k + 1, self.due + self.gap
            self.A = self.sketch(self.k).double()
            M = self.A @ (old.T @ M)
        self.M = b1 * M + (1 - b1) * self.A @ u
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
    ("subspace", "momentum_sketch"): Entry(FLora, flora),
    ("moments", "sketched_momentum"): Entry(FLora, flora),
    ("reconstruction", "flora"): Entry(FLora, flora),
}
