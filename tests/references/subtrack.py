"""SubTrack (workshop paper) and SubTrack++ (arXiv 2502.01586): one rank-1 step on the Grassmannian a refresh."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import atan2, cos, sin
from typing import Any

import torch
from torch import Tensor

from references.base import LowRank
from references.case import Case, Entry


def geodesic(P: Tensor, G: Tensor, *, rule: str, eta: float, direction: str = "descend") -> Tensor:
    """One rank-1 step from P. rule: auto, normalized or raw; direction: descend, or printed (of raw)."""
    A = P.T @ G  # Algorithm 1: argmin_A ||P A - G|| for orthonormal P
    T = (G - P @ A) @ A.T  # eq. 5: grad F = -2 T
    U, S, Vh = torch.linalg.svd(T, full_matrices=False)
    u, sigma, v = U[:, :1], float(S[0]), Vh[:1].T
    if sigma <= 1e-12 * float(G.norm() ** 2):  # r = m, or nothing outside: no direction to turn to
        return P
    if rule == "auto":  # energy a cos^2 + b sin^2 + 2 sigma sin cos along the geodesic is largest at
        a, b = float((A.T @ v).norm() ** 2), float((G.T @ u).norm() ** 2)
        theta = 0.5 * atan2(2 * sigma, a - b)
    else:  # eq. 6: theta = eta sigma(grad F), sigma(grad F) = 2 sigma(T)
        theta = eta * 2 * sigma / (float(G.norm() ** 2) if rule == "normalized" else 1.0)
        if direction == "printed":  # u of grad F is minus that of T: uphill
            theta = -theta
    return P + ((cos(theta) - 1) * P @ v + sin(theta) * u) @ v.T  # eq. 6


@dataclass
class SubTrack(LowRank):
    """rule is the option step; SubTrack++ is on_refresh="rotate_variance", form="released" as its code."""

    _: KW_ONLY
    rule: str = "auto"
    eta: float = 1.0
    direction: str = "descend"
    accumulate: bool = False
    scale: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.total: Any = 0.0
        self.count = 0

    def observe(self, G: Tensor) -> None:
        self.total, self.count = self.total + G, self.count + 1  # eq. 2, the current gradient included

    def refresh(self, G: Tensor) -> None:
        seen = self.total / self.count if self.accumulate else G
        self.total, self.count = 0.0, 0
        if self.P is None:  # eq. 1
            return super().refresh(G)
        self.move_to(geodesic(self.P, seen, rule=self.rule, eta=self.eta, direction=self.direction))


def tracked(case: Case) -> dict[str, Any]:
    o = case.options
    way = {"descending": "descend", "printed": "printed"}[o["direction"]]
    return {"rule": o["step"], "eta": o["eta"], "accumulate": o["accumulate"], "direction": way}


REFERENCES = {("subspace", "grassmann"): Entry(SubTrack, tracked)}
