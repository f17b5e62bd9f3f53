"""Moments with small second statistics on R: Adafactor (1804.04235), CAME (2307.02047), Adam-mini (2406.16793)."""

from __future__ import annotations

import re
from math import sqrt
from typing import Any

from torch import Tensor

from references.base import Adam
from references.case import Case, Entry


def rms(X: Tensor) -> float:
    return float(X.norm()) / sqrt(X.numel())


def clipped(U: Tensor, threshold: float = 1.0) -> Tensor:
    """Adafactor Algorithm 6 (section 6): U / max(1, RMS(U) / d)."""
    return U / max(1.0, rms(U) / threshold)


class Factored:
    """EMA of the row and column means of non-negative X (r, n); X is taken to be row column^T / mean(row)."""

    row: Any = 0.0  # (r, 1)
    column: Any = 0.0  # (1, n)

    def update(self, X: Tensor, beta: float) -> Tensor:
        self.row = beta * self.row + (1 - beta) * X.mean(1, keepdim=True)
        self.column = beta * self.column + (1 - beta) * X.mean(0, keepdim=True)
        return self.row * self.column / self.row.mean()

    def rotated(self, C: Tensor) -> Factored:
        """row_i <- sum_j C_ij^2 row_j; columns, of the long side, stay."""
        new = Factored()
        new.row, new.column = (C * C) @ self.row, self.column
        return new


class Adafactor:
    """Adafactor with a first moment of the normalised update, lr outside it.

    The update is limited before the momentum or, with `late`, the step after it (flora-opt).
    """

    M: Any = 0.0
    t = 0

    def __init__(self, decay: float = 0.8, threshold: float = 1.0, *, late: bool = False) -> None:
        self.decay, self.threshold, self.late, self.v = decay, threshold, late, Factored()

    def __copy__(self) -> Adafactor:
        return type(self)(self.decay, self.threshold, late=self.late)

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        self.t += 1
        u = R / self.v.update(R * R + 1e-30, 1 - self.t**-self.decay).sqrt()
        self.M = h.beta1 * self.M + (1 - h.beta1) * (u if self.late else clipped(u, self.threshold))
        return (clipped(self.M, self.threshold) if self.late else self.M), 1.0

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        if how != "keep":
            self.M, self.v = C @ self.M, self.v.rotated(C)


class CAME:
    """CAME Algorithm 2."""

    M: Any = 0.0

    def __init__(self, beta3: float = 0.9999, threshold: float = 1.0, eps2: float = 1e-16) -> None:
        self.beta3, self.threshold, self.eps2, self.v, self.s = beta3, threshold, eps2, Factored(), Factored()

    def __copy__(self) -> CAME:
        return CAME(self.beta3, self.threshold, self.eps2)

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        u = clipped(R / self.v.update(R * R + 1e-30, h.beta2).sqrt(), self.threshold)
        self.M = h.beta1 * self.M + (1 - h.beta1) * u
        S = self.s.update((u - self.M) ** 2 + self.eps2, self.beta3)  # instability of the update
        return self.M / S.sqrt(), 1.0

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        if how != "keep":
            self.M, self.v, self.s = C @ self.M, self.v.rotated(C), self.s.rotated(C)


class AdamMini(Adam):
    """Adam with one second moment per block of R.

    by = "row": one per row of R; "column": one per column; a number: one per so many columns (a head). Columns are
    output neurons where the weight is seen transposed. `outside`: hand the bias correction out, as Adam does.
    """

    def __init__(self, by: str | int = "row", outside: bool = False) -> None:
        self.by, self.outside = by, outside

    def second(self, squares: Tensor) -> Tensor:
        if self.by == "row":
            return squares.mean(1, keepdim=True).expand_as(squares)
        if self.by == "column":
            return squares.mean(0, keepdim=True).expand_as(squares)
        r, n = squares.shape
        heads = squares.reshape(r, n // int(self.by), int(self.by)).mean((0, 2), keepdim=True)
        return heads.expand(r, -1, int(self.by)).reshape(r, n)

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        N, c = super().update(R, h)
        return (N, c) if self.outside else (c * N, 1.0)

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        if how != "keep":
            self.M = C @ self.M
            if self.by == "row":  # one per column is a mean over the rows and stays
                self.V = (C * C) @ self.V


def blocks(case: Case) -> str | int:
    """Columns are neurons where the weight is seen transposed; heads of queries and keys if their size is known."""
    head = case.options["head_dim"]
    if not case.flip:
        return "row"
    attention = re.search(r"(q_proj|k_proj|query|key)\.weight$", case.name)
    return head if head and attention and max(case.shape) % head == 0 else "column"


class AdaLomo:
    """AdaLomo Algorithm 1: Adafactor's clipped update without momentum, times max(1e-3, RMS(W))."""

    t = 0

    def __init__(self, decay: float = 0.8, threshold: float = 1.0, smallest: float = 1e-3) -> None:
        self.decay, self.threshold, self.smallest, self.v = decay, threshold, smallest, Factored()

    def __copy__(self) -> AdaLomo:
        return AdaLomo(self.decay, self.threshold, self.smallest)

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        self.t += 1
        u = clipped(R / self.v.update(R * R + 1e-30, 1 - self.t**-self.decay).sqrt(), self.threshold)
        return max(self.smallest, rms(h.W)) * u, 1.0

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        if how != "keep":
            self.v = self.v.rotated(C)


def adalomo(case: Case) -> AdaLomo:
    o = case.options
    return AdaLomo(o["decay_rate"], o["clip_threshold"], o["smallest_weight"])


def adafactor(case: Case) -> Adafactor:
    late = {"update": False, "step": True}[case.options["clip_at"]]
    return Adafactor(case.options["decay_rate"], case.options["clip_threshold"], late=late)


def came(case: Case) -> CAME:
    return CAME(case.options["beta3"], case.options["clip_threshold"], case.options["eps2"])


REFERENCES = {
    ("moments", "adafactor"): Entry(fields=lambda case: {"moments": adafactor(case)}),
    ("moments", "adalomo"): Entry(fields=lambda case: {"moments": adalomo(case)}),
    ("moments", "came"): Entry(fields=lambda case: {"moments": came(case)}),
    ("moments", "adam_mini"): Entry(fields=lambda case: {"moments": AdamMini(blocks(case), outside=True)}),
}
