"""Alice and RACS (arXiv 2502.07752), and FRUGAL (arXiv 2411.07837): what to do with what a subspace leaves out."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from itertools import count
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from references.base import LowRank, aligned
from references.case import Case, Entry


def switched(U: Tensor, leading: int, noise: Any) -> Tensor:
    """The first `leading` columns of U, and a random orthonormal frame of the complement of all of U."""
    m, r = U.shape
    drawn = min(r - leading, m - r)
    if drawn == 0:
        return U
    rest = noise(m, drawn)
    frame = torch.linalg.qr(rest - U @ (U.T @ rest))[0]
    return torch.cat([U[:, : r - drawn], frame], 1)


@dataclass
class Switching(LowRank):
    """U = one step of subspace iteration on A from the basis before, by eigenvalue; then `switched`.

    A = G G^T, or with tracking b3 P Q P^T + (1 - b3) G G^T, Q = b3 Q + (1 - b3) R R^T.
    """

    _: KW_ONLY
    noise: Any = None
    leading: int = 0
    tracking: bool = False
    beta3: float = 0.999
    Q: Any = 0.0

    def refresh(self, G: Tensor) -> None:
        if self.P is None:
            U = torch.linalg.svd(G, full_matrices=False)[0][:, : self.rank]
        else:
            A = G @ G.T
            if self.tracking:
                A = self.beta3 * self.P @ self.Q @ self.P.T + (1 - self.beta3) * A
            U = torch.linalg.qr(A @ self.P)[0]
            U = U @ torch.linalg.eigh(U.T @ A @ U)[1].flip(1)
        self.move_to(aligned(switched(U, self.leading, self.noise), self.P))

    def combine(self, G: Tensor, R: Tensor, N: Tensor, c: float) -> Tensor:
        self.Q = self.beta3 * self.Q + (1 - self.beta3) * R @ R.T
        return super().combine(G, R, N, c)


@dataclass
class Compensated(LowRank):
    """U = scale (c P N + a_c C), C = sqrt(m - r) (G - P R) p^-1/2, limited; p: EMA of the squared columns outside."""

    _: KW_ONLY
    weight_outside: float = 0.4
    p: Any = 0.0

    def combine(self, G: Tensor, R: Tensor, N: Tensor, c: float) -> Tensor:
        super().combine(G, R, N, c)
        m, r = self.P.shape
        E = G - self.P @ R
        if r == m:
            return self.scale * c * self.P @ N
        self.p = self.beta1 * self.p + (1 - self.beta1) * E.square().sum(0)
        p = self.p / (1 - self.beta1 ** (self.steps + 1)) if self.correct_bias else self.p
        C = self.limit(sqrt(m - r) * E / p.sqrt(), limiter=self.limiter)
        return self.scale * (c * self.P @ N + self.weight_outside * C)


@dataclass
class Frugal(LowRank):
    """U = c scale P N + f sign(G - P R), or with columns of unit RMS."""

    _: KW_ONLY
    free: str = "sign"
    free_scale: float = 1.0

    def combine(self, G: Tensor, R: Tensor, N: Tensor, c: float) -> Tensor:
        E = G - self.P @ R
        inside = c * self.scale * self.P @ N
        if len(self.P) == self.P.shape[1]:
            return inside
        return inside + self.free_scale * (E.sign() if self.free == "sign" else E / E.square().mean(0).sqrt())


@dataclass
class UnitColumns(LowRank):
    """SCALE (arXiv 2506.16659, Algorithm 1): every column of the gradient with unit RMS."""

    def combine(self, G: Tensor, R: Tensor, N: Tensor, c: float) -> Tensor:
        return self.scale * G / G.square().mean(0).sqrt()


class RACS:
    """s = (R^2)^T q / |q|^2, q = R^2 s / |s|^2 from q = 1; EMA; N = diag(q)^-1/2 R diag(s)^-1/2, limited."""

    q: Any = 0.0
    s: Any = 0.0
    t = 0
    last: float | None = None

    def __init__(self, iterations: int = 5, limiter: float = 1.01) -> None:
        self.iterations, self.limiter = iterations, limiter

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        self.t += 1
        A, q = R * R, torch.ones(len(R), dtype=R.dtype)
        for _ in range(self.iterations):
            s = A.T @ q / q.square().sum()
            q = A @ s / s.square().sum()
        self.q, self.s = h.beta1 * self.q + (1 - h.beta1) * q, h.beta1 * self.s + (1 - h.beta1) * s
        start = 1 - h.beta1**self.t if h.correct_bias else 1.0
        N = start * R / (self.q[:, None] * self.s).sqrt()
        if self.last is not None:
            N = N / max(1.0, float(N.norm()) / (self.last + 1e-8) / self.limiter)
        self.last = float(N.norm())
        return N, 1.0

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        if how != "keep":
            self.q = (C * C) @ self.q


def switching(case: Case) -> dict[str, Any]:
    o, numbers = case.options, count()
    r = min(case.rank, case.m)
    leading = max(5 * r // 16, 1) if o["leading"] is None else min(o["leading"], r)

    def noise(m: int, drawn: int) -> Tensor:
        draws = torch.randn(*case.stack, m, drawn, generator=case.generator(next(numbers)))
        return (draws[case.place] if case.stack else draws).double()

    return {"noise": noise, "leading": leading, "tracking": o["tracking"], "beta3": o["tracking_decay"]}


def compensated(case: Case) -> dict[str, Any]:
    return {"weight_outside": case.options["compensation"], "limiter": case.options["limiter"]}


REFERENCES = {
    ("subspace", "alice"): Entry(Switching, switching),
    ("reconstruction", "compensation"): Entry(Compensated, compensated),
    ("reconstruction", "frugal"): Entry(
        Frugal, lambda case: {key: case.options[key] for key in ("free", "free_scale")}
    ),
    ("reconstruction", "unit_columns"): Entry(UnitColumns),
    ("moments", "racs"): Entry(
        fields=lambda case: {"moments": RACS(case.options["iterations"], case.options["limiter"])}
    ),
}
