"""Leading vectors by one power step, and others drawn from what they leave: Alice.

Legend: P basis (..., m, r) · A = G G^T, or its tracked mean (..., m, m), never formed · U orthonormal (..., m, r) · Q
running mean of R R^T (..., r, r).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import flag, integer, number
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.methods.subspaces.dominant import dominant
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors import kernels, random
from hf_lowrank.tensors.sums import Asking, Rule, Sum


@dataclass(frozen=True)
class Alice(Subspace, key="alice"):
    """P = [the first `leading` of U, the others orthonormal, drawn uniformly from the complement of all of U].

    U = the eigenvectors, largest first, of A in the span of A P: one step of subspace iteration from the basis before,
    with A = G G^T (Alice-0). With `tracking` A = b3 P Q P^T + (1 - b3) G G^T, and Q <- b3 Q + (1 - b3) R R^T at every
    step. The first U are the leading singular vectors of the gradient.

    Where the complement has fewer dimensions than are to be drawn, more of U is taken: at r = m all of it.

    State: mr; with tracking mr + r^2.

    References:
        Alice, arXiv 2502.07752, section 5 (subspace switching and tracking). Its `leading` is 40 at ranks 128 and 256,
        160 at 512; the default here is 5/16 of the rank, at least 1.

    Differs from the authors' code: none was released. The complement is drawn as a random orthonormal frame in it, not
    as columns of one basis of it; signs are aligned with the basis before.
    """

    leading: int | None = integer(
        None, minimum=0, help="Alice: leading vectors that are always taken; default 5/16 rank, at least 1"
    )
    tracking: bool = flag(False, help="Alice: follow the running mean of R R^T and not this gradient alone")
    tracking_decay: float = number(0.999, below=1.0, help="Alice: b3, decay of the running mean of R R^T")

    @override
    def slots(self) -> Slots:
        return {**super().slots(), **({"tracked": Slot("r r", values="exact")} if self.tracking else {})}

    @override
    def observe(self, s: State, R: Tensor, ctx: Context) -> Rule[None]:
        return self._track(s, R) if self.tracking else None

    def _track(self, s: State, R: Tensor) -> Asking[None]:
        squares = yield Sum(R @ R.mT, over="columns")
        s["tracked"].lerp_(squares, 1 - self.tracking_decay)

    @override
    def first(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        U, sigma = dominant(G, s["basis"], "gram", ctx)
        return self._switched(U, ctx), sigma

    @override
    def choose(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        G, P = G.float(), s["basis"]
        Q, weight = (s["tracked"], self.tracking_decay) if self.tracking else (None, 0.0)
        image = (1 - weight) * (G @ (G.mT @ P))
        if Q is not None:
            image += weight * (P @ Q)
        U = kernels.orthonormalize(image)
        B = random.float64(U.mT @ G)
        inner = (1 - weight) * (B @ B.mT)
        if Q is not None:
            C = random.float64(U.mT @ P)
            inner += weight * (C @ random.float64(Q) @ C.mT)
        turn = torch.linalg.eigh(inner)[1].flip(-1)  # largest first
        return self._switched(U @ turn.to(U), ctx), None

    def _switched(self, U: Tensor, ctx: Context) -> Tensor:
        """Return U with its last columns replaced by a random frame of the complement of all of U."""
        m, r = U.shape[-2:]
        wanted = r - (max(5 * r // 16, 1) if self.leading is None else min(self.leading, r))
        drawn = min(wanted, m - r)
        if drawn == 0:
            return U
        where = random.with_float64(U.device)
        X = torch.randn(*U.shape[:-1], drawn, generator=ctx.generator(), dtype=torch.float32, device=where).to(U)
        for _ in range(2):  # once more for what rounding leaves
            X = X - U @ (U.mT @ X)
        return torch.cat([U[..., : r - drawn], kernels.orthonormalize(X)], -1)
