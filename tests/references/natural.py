"""Natural GaLore (arXiv 2410.16029): Adam on F^-1 vec(R), F from a window of projected gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from references.base import Adam
from references.case import Case, Entry


class NaturalAdam(Adam):
    """F = lambda I + H H^T, H the last `window` projected gradients, the current one among them, as columns.

    lambda = damping tr(H^T H) / s for the s columns held so far, with the step lambda F^-1 vec(R); or damping itself,
    with the step F^-1 vec(R), if `absolute`. At a refresh the window is turned into the new basis (on_window="rotate")
    or emptied ("clear").
    """

    H: tuple[Tensor, ...] = ()

    def __init__(self, window: int, damping: float, *, absolute: bool = False, on_window: str = "rotate") -> None:
        self.window, self.damping, self.absolute, self.on_window = window, damping, absolute, on_window

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        self.H = (R, *self.H)[: self.window]
        return super().update(self.natural(R), h)

    def natural(self, R: Tensor) -> Tensor:
        H = torch.stack([X.flatten() for X in self.H], dim=1)  # (r n, s)
        damping = self.damping if self.absolute else self.damping * float((H * H).sum()) / H.shape[1]
        if damping == 0:  # nothing but zeros so far
            return R
        F = damping * torch.eye(len(H), dtype=torch.float64) + H @ H.T
        natural = torch.linalg.solve(F, R.flatten()).reshape(R.shape)
        return natural if self.absolute else damping * natural

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        super().transport(how, C, h)
        self.H = tuple(C @ X for X in self.H) if self.on_window == "rotate" else ()


def windowed(case: Case) -> NaturalAdam:
    o = case.options
    kind = {"relative": False, "absolute": True}[o["damping_kind"]]
    return NaturalAdam(o["history"], o["damping"], absolute=kind, on_window=o["window"])


# it solves a system whose condition number is some 100
REFERENCES = {
    ("moments", "natural_adam"): Entry(fields=lambda case: {"moments": windowed(case)}, tolerance=lambda case: 3e-5)
}
