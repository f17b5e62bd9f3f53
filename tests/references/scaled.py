"""APOLLO and APOLLO-Mini (arXiv 2412.05270): the gradient, scaled as Adam scales its random projection."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from references.base import LowRank
from references.case import Case, Entry


@dataclass
class Apollo(LowRank):
    """`choose` gives Pi^T (m, r), Pi_ij ~ N(0, 1/r), or singular vectors. Mini: rank=1, by="tensor", scale=128."""

    _: KW_ONLY
    by: str = "channel"  # or tensor
    scale_front: bool = False

    def combine(self, G: Tensor, R: Tensor, N: Tensor, c: float) -> Tensor:
        over = 0 if self.by == "channel" else (0, 1)  # s_j = ||N_j|| / ||R_j|| per column, or s = ||N|| / ||R||
        U = G * N.norm(dim=over) / (R.norm(dim=over) + 1e-8)
        if self.scale_front:
            return c * self.limit(U * self.scale**0.5, 1e-8, self.limiter)
        return c * self.limit(U, 1e-8, self.limiter) * self.scale**0.5


def scaling(case: Case) -> dict[str, Any]:
    o = case.options
    return {"by": o["scaling"], "scale_front": o["limit"] == "back", "limiter": o["limiter"]}


REFERENCES = {("reconstruction", "scaled_gradient"): Entry(Apollo, scaling)}
