"""The published updates in plain float64. Imports nothing from the package; written from the papers.

Notation of the papers, matrices seen short side first (m <= n; square ones transposed, as all released code does):
W weight, G gradient, P basis (m, r), R = P^T G, M and V moments, C = P_new^T P_old.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor


Choose = Callable[[Tensor, int, "Tensor | None"], Tensor]
"""(gradient, rank, basis before or None) -> basis."""


def dominant(G: Tensor, r: int, old: Tensor | None) -> Tensor:
    """GaLore Algorithm 2: U, S, V = SVD(G); P = U[:, :r]. Signs by the package's rule (the papers leave them open)."""
    P = torch.linalg.svd(G, full_matrices=False)[0][:, :r]
    largest = P.gather(0, P.abs().argmax(0, keepdim=True))[0]
    pivot = largest if old is None else (P.T @ old).diagonal()
    return P * torch.where(pivot < 0, -1.0, 1.0)


def keep(C: Tensor, M: Tensor, V: Tensor, **_: float) -> tuple[Tensor, Tensor]:
    """GaLore, Fira and I3S (Algorithm 1 runs on with V^(t-1), M^(t-1)) leave the moments as they are."""
    return M, V


def rotate(C: Tensor, M: Tensor, V: Tensor, **_: float) -> tuple[Tensor, Tensor]:
    """I3S Algorithm 3, line 6: M <- P_t^T P_{t-1} M; it says nothing of V."""
    return C @ M, V


def rotate_variance(C: Tensor, M: Tensor, V: Tensor, *, beta1: float, beta2: float, t: int) -> tuple[Tensor, Tensor]:
    """LDAdam Algorithm 1 (methods-2.md section 4, steps 4 and 6); t updates so far."""
    c1, c2 = 1 - beta1**t, 1 - beta2**t
    moved = C @ M
    return moved, c2 * ((C * C) @ (V / c2 - (M / c1) ** 2) + (moved / c1) ** 2).abs()


def rotate_variance_complete(
    C: Tensor, M: Tensor, V: Tensor, *, beta1: float, beta2: float, t: int
) -> tuple[Tensor, Tensor]:
    """The same, and a new direction's share outside the old span gets the mean of V (methods-1.md section 9)."""
    moved, variance = rotate_variance(C, M, V, beta1=beta1, beta2=beta2, t=t)
    lost = 1 - (C * C).sum(1, keepdim=True)
    return moved, variance + lost * V.mean(0, keepdim=True)


TRANSPORTS = {
    "keep": keep,
    "rotate": rotate,
    "rotate_variance": rotate_variance,
    "rotate_variance_complete": rotate_variance_complete,
}


@dataclass
class LowRankAdam:
    """One matrix trained by GaLore-Adam or Fira-Adam in a subspace of any choice. Attributes may be edited."""

    W: Tensor
    rank: int
    gap: int
    choose: Choose = dominant
    form: str = "galore"  # or a form of Fira: released, i3s, paper
    on_refresh: str = "keep"
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    scale: float = 0.25
    limiter: float = 1.01
    correct_bias: bool = True
    transposed: bool | None = None  # None: proj_type=std

    def __post_init__(self) -> None:
        rows, columns = self.W.shape
        self.flip = rows >= columns if self.transposed is None else self.transposed
        self.W = self._wide(self.W)
        self.rank = min(self.rank, rows, columns)
        self.P: Tensor | None = None
        self.M = torch.zeros(self.rank, self.W.shape[1], dtype=torch.float64)
        self.V = torch.zeros_like(self.M)
        self.steps = self.t = self.due = 0
        self.last: Tensor | None = None  # norm of Fira's limited residual
        self.limited: list[bool] = []

    @property
    def weight(self) -> Tensor:
        return self.W.T if self.flip else self.W

    def _wide(self, X: Tensor) -> Tensor:
        return X.double().T if self.flip else X.double()

    def step(self, gradient: Tensor) -> None:
        G = self._wide(gradient)
        if self.steps == self.due:
            self._refresh(G)
        assert self.P is not None
        P, self.steps, self.t = self.P, self.steps + 1, self.t + 1
        R = P.T @ G  # GaLore eq. 4/Algorithm 2; I3S eq. 1
        self.M = self.beta1 * self.M + (1 - self.beta1) * R
        self.V = self.beta2 * self.V + (1 - self.beta2) * R * R
        if self.correct_bias:  # GaLore Algorithm 2; epsilon as torch.optim.AdamW places it
            c1, c2 = 1 - self.beta1**self.t, 1 - self.beta2**self.t
            N = (self.M / c1) / ((self.V / c2).sqrt() + self.eps)
            c_t = sqrt(c2) / c1
        else:  # I3S eq. 1 as printed
            N, c_t = self.M / (self.V.sqrt() + self.eps), 1.0
        self.W = self.W * (1 - self.lr * self.weight_decay)  # decoupled, before the update
        self.W = self.W - self.lr * self._update(G, P, R, N, c_t)

    def _refresh(self, G: Tensor) -> None:
        new = self.choose(G, self.rank, self.P)
        if self.P is not None:
            if self.on_refresh == "reset":
                self.M, self.V, self.t = torch.zeros_like(self.M), torch.zeros_like(self.V), 0
            else:
                how: Any = TRANSPORTS[self.on_refresh]
                self.M, self.V = how(new.T @ self.P, self.M, self.V, beta1=self.beta1, beta2=self.beta2, t=self.t)
        self.P = new
        self.due += self.gap

    def _update(self, G: Tensor, P: Tensor, R: Tensor, N: Tensor, c_t: float) -> Tensor:
        """N is corrected; the released Fira scales its residual by the uncorrected one, N / c_t."""
        if self.form == "galore":
            return self.scale * P @ N  # GaLore Algorithm 2; I3S eq. 1
        if self.form == "paper":  # Fira Algorithm 1: alpha (P N + limited(phi(S)))
            S = self._limited(self._phi(N, R, self.eps) * (G - P @ R), self.eps)
            return self.scale * (P @ N + S)
        # I3S section 2.2: alpha P N + phi(S), S = (I - P P^T) G; fira 1.0.2: the residual leaves out alpha P R only
        S = G - (P @ R if self.form == "i3s" else self.scale * P @ R)
        return self.scale * P @ N + c_t * self._limited(self._phi(N / c_t, R, 1e-8) * S, 1e-8)

    def _phi(self, N: Tensor, R: Tensor, eps: float) -> Tensor:
        """Fira eq. 12, one factor for every column: ||N_j|| / (||R_j|| + eps)."""
        return N.norm(dim=0) / (R.norm(dim=0) + eps)

    def _limited(self, S: Tensor, eps: float) -> Tensor:
        """Fira eq. 13: the norm grows by at most the limiter from one step to the next."""
        norm = S.norm()
        if self.last is not None:
            growth = norm / (self.last + eps)
            self.limited.append(bool(growth > self.limiter))
            if growth > self.limiter:
                S = S * self.limiter / growth
        self.last = S.norm()
        return S


def adamw(
    W: Tensor, gradients: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float, wd: float
) -> Tensor:
    """AdamW (arXiv 1711.05101, Algorithm 2, schedule 1) as torch documents it."""
    W, M, V = W.double(), torch.zeros_like(W.double()), torch.zeros_like(W.double())
    for t, gradient in enumerate(gradients, 1):
        G = gradient.double()
        M, V = betas[0] * M + (1 - betas[0]) * G, betas[1] * V + (1 - betas[1]) * G * G
        W = W - lr * wd * W
        W = W - lr * (M / (1 - betas[0] ** t)) / ((V / (1 - betas[1] ** t)).sqrt() + eps)
    return W
