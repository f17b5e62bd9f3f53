"""Adafactor's second moment of the whole gradient with a sketched first moment: FLora.

Legend: G gradient (..., m, n) · u = G / sqrt(V^), V^ = row col^T / mean(row) · A = P^T sketch (r, m) · M (..., r, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.moments.factored import TINY, inverse_root
from hf_lowrank.methods.options import number
from hf_lowrank.methods.parts import Facts, Reconstruction, Update
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.sums import Summing


@dataclass(frozen=True)
class Flora(Reconstruction, key="flora"):
    """U = ((1 - b1) u + b1 A^T M_old) / max(1, RMS / clip), u = G / sqrt(V^), and M follows A u.

    The second moment is Adafactor's and sees the gradient before the sketch; the sketch keeps the momentum alone. With
    N = M the new momentum, b1 M_old = N - (1 - b1) A u.

    State: m + n.

    References:
        FLora, arXiv 2402.03293, Algorithm 2.

    Differs from the authors' code: no parameter scaling and no relative step; matrices are compressed whatever the
    ratio of their sides.
    """

    needs_gradient: ClassVar[bool] = True
    composable: ClassVar[bool] = False

    decay_rate: float = number(0.8, help="Adafactor, FLora: the second moment's decay is 1 - t^-decay_rate")
    clip_threshold: float = number(1.0, above=0.0, help="Adafactor, CAME, FLora: largest RMS of an update")

    def slots(self, batch: tuple[int, ...], m: int, n: int, r: int, piece: tuple[int, int]) -> Slots:
        """See `Reconstruction.slots`."""
        return {"row": Slot((*batch, piece[0]), "exact"), "col": Slot((*batch, piece[1]), "exact")}

    def absorb(self, s: State, G: Tensor, ctx: Context) -> Summing[tuple[Tensor, dict[str, Tensor]]]:
        """See `Reconstruction.absorb`: u, and the statistics that include this gradient."""
        square = G.float().square().add_(TINY)
        rows, columns = square.sum(-1), square.sum(-2)
        if ctx.split == "rows":
            columns = yield columns
        elif ctx.split == "columns":
            rows = yield rows
        beta2 = 1 - ctx.moment_step**-self.decay_rate
        row = torch.lerp(s["row"], rows / ctx.columns.n, 1 - beta2)
        col = torch.lerp(s["col"], columns / ctx.m, 1 - beta2)
        total = row.sum(-1)
        if ctx.split == "rows":
            total = yield total
        u = inverse_root(row, (total / ctx.m).unsqueeze(-1), col).mul_(G)
        return u, {"row": row, "col": col}

    def combine(self, s: State, facts: Facts, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Summing[Update]:
        """See `Reconstruction.combine`. ||U||^2 follows from products of size r x n."""
        fresh = 1 - ctx.beta1
        Z = N.sub_(R, alpha=fresh)
        squares = facts.inside(Z, Z.square().sum(-2)) + 2 * fresh * (Z * R).sum(-2) + fresh**2 * facts.norms()
        total = yield squares.clamp_min_(0).sum(-1)
        rms = (total / (ctx.m * ctx.columns.n)).sqrt()
        factor = (ctx.scale / (rms / self.clip_threshold).clamp_min(1.0)).unsqueeze(-1)
        return Update(Z * factor.unsqueeze(-1), d=(fresh * factor).expand(squares.shape))
