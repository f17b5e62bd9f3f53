"""Low-rank momentum SGD (I3S paper, Algorithm 4; GoLore section 3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from references.case import Entry


class Momentum:
    """M <- b1 M + (1 - b1) R (line 15), W <- W - lr P M (lines 16, 17): no scale, no bias correction."""

    M: Any = 0.0

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        self.M = h.beta1 * self.M + (1 - h.beta1) * R
        return self.M, 1.0

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        if how != "keep":  # line 10 (hybrid, GoLore); I3S keeps
            self.M = C @ self.M


REFERENCES = {("moments", "momentum"): Entry(fields=lambda case: {"moments": Momentum()})}
