"""GaLore on both sides (proj_type=full, as galore-torch; eq. 10 of the Natural GaLore draft): R = P^T G Q."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from references.base import Choose, LowRank, dominant


@dataclass
class TwoSided(LowRank):
    """Moments are r x r; `choose` gives P from G, `choose_right` Q from G^T."""

    _: KW_ONLY
    choose_right: Choose = dominant

    def __post_init__(self) -> None:
        super().__post_init__()
        self.Q: Tensor | None = None

    def refresh(self, G: Tensor) -> None:
        P, Q = self.choose(G, self.rank, self.P), self.choose_right(G.T, self.rank, self.Q)
        if self.P is not None and self.Q is not None:
            self.carry(P.T @ self.P, Q.T @ self.Q)
        self.P, self.Q = P, Q

    def carry(self, C: Tensor, D: Tensor) -> None:
        """M <- C M D^T; rotate_variance: V <- c2 |C^2 (V / c2 - (M / c1)^2) D^2^T + (C M D^T / c1)^2|."""
        s = self.moments
        if self.on_refresh in ("keep", "reset"):
            return self.transport(C)
        moved = C @ s.M @ D.T
        if self.on_refresh == "rotate_variance":
            c1, c2 = 1 - self.beta1**s.t, 1 - self.beta2**s.t
            s.V = c2 * ((C * C) @ (s.V / c2 - (s.M / c1) ** 2) @ (D * D).T + (moved / c1) ** 2).abs()
        s.M = moved

    def update(self, G: Tensor) -> Tensor:
        if self.steps == self.due:
            self.refresh(G)
            self.due += self.interval()
        assert self.P is not None and self.Q is not None
        N, c = self.moments.update(self.P.T @ G @ self.Q, self)
        return c * self.scale * self.P @ N @ self.Q.T
