"""The loop that most references share: a basis, moments in it, the step. float64; imports nothing of the package.

Notation of the papers: W weight, G gradient, P basis (m, r), R = P^T G, M and V moments, C = P_new^T P_old, N
direction before an outside bias correction c. Matrices are seen short side first (square ones transposed), decay comes
first, then W <- W - lr U.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import KW_ONLY, dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor


Choose = Callable[[Tensor, int, "Tensor | None"], Tensor]
"""(gradient, rank, basis before or None) -> basis."""


def aligned(P: Tensor, old: Tensor | None) -> Tensor:
    """The package's signs: largest entries positive at first, then diag(P_new^T P_old) >= 0."""
    pivot = P.gather(0, P.abs().argmax(0, keepdim=True))[0] if old is None else (P.T @ old).diagonal()
    return P * torch.where(pivot < 0, -1.0, 1.0)


def dominant(G: Tensor, r: int, old: Tensor | None) -> Tensor:
    """GaLore Algorithm 2: U, S, V = SVD(G); P = U[:, :r]. Signs by the package's rule (the papers leave them open)."""
    return aligned(torch.linalg.svd(G, full_matrices=False)[0][:, :r], old)


def keep(C: Tensor, M: Tensor, V: Tensor, **_: float) -> tuple[Tensor, Tensor]:
    """GaLore, Fira and I3S (Algorithm 1 runs on with V^(t-1), M^(t-1)) leave the moments as they are."""
    return M, V


def rotate(C: Tensor, M: Tensor, V: Tensor, **_: float) -> tuple[Tensor, Tensor]:
    """I3S Algorithm 3, line 6: M <- P_t^T P_{t-1} M; it says nothing of V."""
    return C @ M, V


def rotate_variance(C: Tensor, M: Tensor, V: Tensor, *, beta1: float, beta2: float, t: int) -> tuple[Tensor, Tensor]:
    """LDAdam Algorithm 1; t updates so far."""
    c1, c2 = 1 - beta1**t, 1 - beta2**t
    moved = C @ M
    return moved, c2 * ((C * C) @ (V / c2 - (M / c1) ** 2) + (moved / c1) ** 2).abs()


def rotate_variance_complete(
    C: Tensor, M: Tensor, V: Tensor, *, beta1: float, beta2: float, t: int
) -> tuple[Tensor, Tensor]:
    """The same, and a new direction's share outside the old span gets the mean of V."""
    moved, variance = rotate_variance(C, M, V, beta1=beta1, beta2=beta2, t=t)
    lost = 1 - (C * C).sum(1, keepdim=True)
    return moved, variance + lost * V.mean(0, keepdim=True)


TRANSPORTS = {
    "keep": keep,
    "rotate": rotate,
    "rotate_variance": rotate_variance,
    "rotate_variance_complete": rotate_variance_complete,
}


def sampled(draw: Callable[[Tensor, int], Tensor]) -> Choose:
    """I3S Algorithm 2: I = sort(draw(S, r)), P = U[:, I]. With r0 leading indices in the draw: Algorithm 3."""

    def choose(G: Tensor, r: int, old: Tensor | None) -> Tensor:
        U, S, _ = torch.linalg.svd(G, full_matrices=False)
        return aligned(U[:, draw(S, r).sort().values], old)

    return choose


class Adam:
    """GaLore Algorithm 2, epsilon where torch.optim.AdamW has it: N c = (M / c1) / (sqrt(V / c2) + eps)."""

    M: Any = 0.0
    V: Any = 0.0
    t = 0

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        self.t += 1
        self.M = h.beta1 * self.M + (1 - h.beta1) * R
        self.V = h.beta2 * self.V + (1 - h.beta2) * self.second(R * R)
        return direction(self.M, self.V, self.t, h)

    def second(self, squares: Tensor) -> Tensor:
        return squares

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        rule: Any = TRANSPORTS[how]
        self.M, self.V = rule(C, self.M, self.V, beta1=h.beta1, beta2=h.beta2, t=self.t)


def direction(M: Tensor, V: Tensor, t: int, h: Any) -> tuple[Tensor, float]:
    """N = M / (sqrt(V) + eps sqrt(c2)) and c = sqrt(c2) / c1; I3S eq. 1 prints neither c1 nor c2.

    eps_place="released": galore-torch's N = M / (sqrt(V) + eps), with the same c.
    """
    if not h.correct_bias:
        return M / (V.sqrt() + h.eps), 1.0
    c1, c2 = 1 - h.beta1**t, 1 - h.beta2**t
    eps = h.eps if h.eps_place == "released" else h.eps * sqrt(c2)
    return M / (V.sqrt() + eps), sqrt(c2) / c1


@dataclass
class Matrix:
    """A weight and what every update needs. Attributes may be edited between steps."""

    W: Tensor
    _: KW_ONLY
    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    scale: float = 1.0
    correct_bias: bool = True
    eps_place: str = "torch"
    transposed: bool | None = None  # None: proj_type=std

    def __post_init__(self) -> None:
        rows, columns = self.W.shape
        self.flip = rows >= columns if self.transposed is None else self.transposed
        self.W = self.wide(self.W)
        self.steps = 0
        self.last: Tensor | None = None  # norm that the limiter let through
        self.limited: list[bool] = []

    @property
    def weight(self) -> Tensor:
        return self.W.T if self.flip else self.W

    def wide(self, X: Tensor) -> Tensor:
        return X.double().T if self.flip else X.double()

    def step(self, gradient: Tensor) -> None:
        U = self.update(self.wide(gradient))
        self.W = (1 - self.lr * self.weight_decay) * self.W - self.lr * U
        self.steps += 1

    def update(self, G: Tensor) -> Tensor:
        raise NotImplementedError

    def limit(self, S: Tensor, eps: float = 1e-8, limiter: float = 1.01) -> Tensor:
        """Fira eq. 13 (also APOLLO, GWT): the norm grows by at most the limiter from one step to the next."""
        if self.last is not None:
            growth = S.norm() / (self.last + eps)
            self.limited.append(bool(growth > limiter))
            S = S * limiter / max(growth, limiter)
        self.last = S.norm()
        return S


@dataclass
class LowRank(Matrix):
    """GaLore and Fira with any basis and any moments; the parents of the methods beside this file."""

    _: KW_ONLY
    rank: int
    gap: int = 200
    choose: Choose = dominant
    moments: Any = Adam()
    on_refresh: str = "keep"
    form: str = "galore"  # or a form of Fira: released, i3s, paper
    limiter: float = 1.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rank = min(self.rank, *self.W.shape)
        self.P: Tensor | None = None
        self.due = self.t = 0  # t: updates of the moments since they were last zero
        self.fresh, self.moments = self.moments, copy(self.moments)

    def update(self, G: Tensor) -> Tensor:
        seen = self.absorb(G)
        self.observe(seen)
        if self.steps == self.due:
            self.refresh(seen)
            self.due += self.interval()
        G = self.absorb(G)  # with what the change of basis has left out
        assert self.P is not None
        R = self.P.T @ G
        N, c = self.moments.update(R, self)
        self.t += 1
        return self.combine(G, R, N, c)

    def absorb(self, G: Tensor) -> Tensor:
        """What takes the place of the gradient."""
        return G

    def observe(self, G: Tensor) -> None:
        """Take note of a gradient."""

    def refresh(self, G: Tensor) -> None:
        self.move_to(self.choose(G, self.rank, self.P))

    def move_to(self, new: Tensor) -> None:
        if self.P is not None:
            self.transport(new.T @ self.P)
        self.P = new

    def transport(self, C: Tensor) -> None:
        if self.on_refresh == "reset":
            self.moments, self.t = copy(self.fresh), 0
        else:
            self.moments.transport(self.on_refresh, C, self)

    def interval(self) -> int:
        return self.gap

    def combine(self, G: Tensor, R: Tensor, N: Tensor, c: float) -> Tensor:
        assert self.P is not None
        P, alpha = self.P, self.scale
        if self.form == "galore":  # GaLore Algorithm 2
            return c * alpha * P @ N
        if self.form == "paper":  # Fira Algorithm 1
            N = c * N
            S = self.phi(N, R, self.eps) * (G - P @ R)
            return alpha * (P @ N + self.limit(S, self.eps, self.limiter))
        # I3S section 2.2 and SubTrack++ Algorithm 1, whose alpha is the learning rate; fira 1.0.2, SubTrack++'s code
        inside = P @ R if self.form == "i3s" else alpha * P @ R
        S = self.phi(N, R, 1e-8) * (G - inside)
        return c * (alpha * P @ N + self.limit(S, 1e-8, self.limiter))

    def phi(self, N: Tensor, R: Tensor, eps: float) -> Tensor:
        """Fira eq. 12, one factor for every column: ||N_j|| / (||R_j|| + eps)."""
        return N.norm(dim=0) / (R.norm(dim=0) + eps)


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
