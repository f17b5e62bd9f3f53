"""Low-rank momentum SGD (I3S paper, Algorithm 4; the first momentum as GoLore's code has it)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from references.case import Case, Entry


class Momentum:
    """M <- b1 M + (1 - b1) R (line 15), W <- W - lr P M (lines 16, 17): no scale, no bias correction.

    whole: M = R at the first step; the released code clones the gradient into its buffer.
    """

    M: Any = None

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        before = (R if self.whole else 0 * R) if self.M is None else self.M
        self.M = h.beta1 * before + (1 - h.beta1) * R
        return self.M, 1.0

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        if how != "keep":  # line 10 (hybrid, GoLore); I3S keeps
            self.M = C @ self.M


def momentum(case: Case) -> dict[str, Any]:
    return {"moments": Momentum({"damped": False, "gradient": True}[case.options["first_momentum"]])}


REFERENCES = {("moments", "momentum"): Entry(fields=momentum)}
