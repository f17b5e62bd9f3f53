"""Adafactor's second moment of the whole gradient with a sketched first moment: FLora.

Legend: G gradient (..., m, n) · u = G / sqrt(V^), V^ = row col^T / mean(row) · A = P^T sketch (r, m) · M (..., r, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Carried, ColumnNorms, Context, Update
from hf_lowrank.methods.moments.factored import CLIP_THRESHOLD, DECAY_RATE, TINY, inverse_root
from hf_lowrank.methods.options import again
from hf_lowrank.methods.parts import Reconstruction
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.sums import Asking, Sum


@dataclass(frozen=True)
class Flora(Reconstruction, key="flora"):
    """U = ((1 - b1) u + b1 A^T M_old) / max(1, RMS / clip), u = G / sqrt(V^), and M follows A u.

    The second moment is Adafactor's and sees the gradient before the sketch; the sketch keeps the momentum alone. With
    N = M the new momentum, b1 M_old = N - (1 - b1) A u.

    The paper has the momentum kept in a Gaussian sketch, carried into a new one every kappa steps, beside Adafactor,
    and decompresses all of it for the step. That the fresh update is added as it is and not through the sketch, that u
    is normalised before it is sketched, that the step is limited after the momentum, and that the step at which the
    sketch changes reads the momentum through the old one and writes its own u through the new one, is its code's.

    State: m + n.

    References:
        FLora, arXiv 2402.03293, Algorithm 2; the step: its code, flora-opt 0.0.3.

    Differs from the authors' code: no parameter scaling and no relative step; matrices are compressed whatever the
    ratio of their sides.
    """

    needs_gradient: ClassVar[bool] = True
    needs_momentum: ClassVar[bool] = True
    replaces_gradient: ClassVar[bool] = True
    composable: ClassVar[bool] = False

    decay_rate: float = again(DECAY_RATE)
    clip_threshold: float = again(CLIP_THRESHOLD)

    @override
    def slots(self) -> Slots:
        return {"row": Slot("m", values="exact", held=True), "col": Slot("n", values="exact", held=True)}

    @override
    def absorb(self, s: State, G: Tensor, ctx: Context) -> Asking[tuple[Tensor, dict[str, Tensor]]]:
        """U, and the statistics that include this gradient."""
        square = G.float().square().add_(TINY)
        rows = yield Sum(square.sum(-1), over="columns")
        columns = yield Sum(square.sum(-2), over="rows")
        beta2 = 1.0 if ctx.written else 1 - ctx.moment_step**-self.decay_rate  # it is in the statistics already
        row = torch.lerp(s["row"], rows / ctx.columns.n, 1 - beta2)
        col = torch.lerp(s["col"], columns / ctx.m, 1 - beta2)
        total = yield Sum(row.sum(-1), over="rows")
        u = inverse_root(row, (total / ctx.m).unsqueeze(-1), col).mul_(G)
        return u, {"row": row, "col": col}

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Asking[Update]:
        """||U||^2 follows from products of size r x n."""
        fresh = 1 - ctx.beta1
        Z = torch.sub(N, R, alpha=fresh)
        squares = norms.projected(Z, Z.square().sum(-2)) + 2 * fresh * (Z * R).sum(-2) + fresh**2 * norms.gradient()
        total = yield Sum(squares.clamp_min_(0).sum(-1), over="columns")
        rms = (total / (ctx.m * ctx.columns.n)).sqrt()
        factor = (ctx.scale / (rms / self.clip_threshold).clamp_min(1.0)).unsqueeze(-1)
        return Update(Z * factor.unsqueeze(-1), d=(fresh * factor).expand(squares.shape))

    @override
    def change_basis_(self, s: State, G: Tensor, old: Carried, new: Carried, ctx: Context) -> None:
        """M <- M + (1 - b1) A_new (u - A_old^T A_old u): what the old sketch has lost of u, the new one sees."""
        lost = G.clone()
        old.basis.accumulate_(lost, old.basis.project(G), -1.0)
        s["exp_avg"].add_(new.basis.project(lost), alpha=1 - ctx.beta1)
