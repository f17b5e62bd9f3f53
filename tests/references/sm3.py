"""SM3-II (arXiv 1901.11150) with the momentum of its section 4: one accumulator for every row and column."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from references.case import Entry


class SM3:
    """nu = min(row, column) + R^2; row, column <- largest of nu; M <- b1 M + (1 - b1) R / sqrt(nu)."""

    M: Any = 0.0
    row: Any = 0.0  # (r, 1)
    column: Any = 0.0  # (1, n)

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        cover = torch.minimum(self.row + torch.zeros_like(R), self.column + torch.zeros_like(R))
        nu = cover + R * R
        self.row, self.column = nu.max(1, keepdim=True).values, nu.max(0, keepdim=True).values
        self.M = h.beta1 * self.M + (1 - h.beta1) * R / (nu + 1e-30).sqrt()
        return self.M, 1.0

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        if how != "keep":
            self.M = C @ self.M


REFERENCES = {("moments", "sm3"): Entry(fields=lambda case: {"moments": SM3()})}
