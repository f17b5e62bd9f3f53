"""Online Subspace Descent (arXiv 2408.12857): the basis is trained by Adam on its own projection error.

As its code does it: no penalty on P^T P - I, torch's AdamW with its weight decay, a learning rate of 1 / gap.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from references.base import LowRank
from references.case import Entry


def error_gradient(P: Tensor, G: Tensor) -> Tensor:
    """d/dP ||P P^T Gh - Gh||_F^2 with Gh = G / ||G||_F: 2 [P A^T A + Gh A P^T P - 2 Gh A], A = Gh^T P."""
    Gh = G / G.norm()
    A = Gh.T @ P
    return 2 * (P @ (A.T @ A) + (Gh @ A) @ (P.T @ P) - 2 * Gh @ A)


@dataclass
class OnlineSubspace(LowRank):
    """P_0 = U[:, :r] of the first gradient; at each later step AdamW moves P, after the weight is written with it."""

    _: KW_ONLY
    scale: float = 0.25
    lr0: float | None = None  # lr at the first step
    from_first: bool = False  # move P at step 0 too
    basis_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.basis_M: Any = 0.0
        self.basis_V: Any = 0.0
        self.basis_t = 0

    def interval(self) -> int:
        return 2**62  # one SVD, ever

    def step(self, gradient: Tensor) -> None:
        first, self.lr0 = self.steps == 0, self.lr if self.lr0 is None else self.lr0
        super().step(gradient)
        if not first or self.from_first:
            self.move(self.absorb(self.wide(gradient)))

    def move(self, G: Tensor) -> None:
        """AdamW with torch's defaults: betas 0.9 and 0.999, eps 1e-8, weight decay 0.01; lr = lr_t / lr_0 / gap."""
        assert self.P is not None and self.lr0 is not None
        lr, D = self.lr / self.lr0 / self.gap, error_gradient(self.P, G)
        self.basis_t += 1
        self.basis_M = 0.9 * self.basis_M + 0.1 * D
        self.basis_V = 0.999 * self.basis_V + 0.001 * D * D
        M, V = self.basis_M / (1 - 0.9**self.basis_t), self.basis_V / (1 - 0.999**self.basis_t)
        self.move_to((1 - self.basis_decay * lr) * self.P - lr * M / (V.sqrt() + 1e-8))


REFERENCES = {
    ("subspace", "online"): Entry(
        OnlineSubspace,
        lambda case: {"gap": 1 / case.options["basis_lr"], "basis_decay": case.options["basis_weight_decay"]},
    )
}
