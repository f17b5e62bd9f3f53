"""One moment, orthogonalised: Muon in a subspace.

Legend: R projected gradient (..., r, n) · M first moment (..., r, n) · X what is orthogonalised, M or b1 M + R · K =
X X^T (..., r, r), a sum over the columns · N direction (..., r, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.moments.adam import Adam
from hf_lowrank.methods.options import flag
from hf_lowrank.methods.parts import Moments
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.sums import Asking, Sum


ADAMS_RMS = 0.2
"""RMS of an update of Adam's, to which that of a whole matrix with orthonormal rows is brought."""


@dataclass(frozen=True)
class Muon(Moments, key="muon"):
    """M <- b1 M + R;  N = 0.2 sqrt(max(m, n)) U V^T for M = U S V^T (nesterov: for b1 M + R), no bias correction.

    The polar factor is K^-1/2 M with K = M M^T, in float64: of a condition of 1e4 K has the square. Directions of
    rounding noise (`inverse_root`) give nothing, so that zeros give zeros.

    State: rn. Dense parameters take Adam. Every step costs one eigendecomposition of an r x r matrix.

    References:
        SUMO, arXiv 2505.24749, Algorithm 1. The factor 0.2 sqrt(max(m, n)): Muon is Scalable for LLM Training, arXiv
        2502.16982.

    Differs from the authors' code: that was not read; from the paper, in that the polar factor comes from K instead of
    a singular value decomposition of M, which needs all columns in one place; SUMO always carries M along, here every
    refresh does what `on_refresh` says (SUMO: rotate); its limiter of the update's growth is left out, since the size
    of N does not depend on the gradient's.
    """

    nesterov: bool = flag(False, help="Muon: orthogonalise b1 M + R instead of M")

    transports: ClassVar[tuple[str, ...]] = ("keep", "rotate", "reset")

    @property
    @override
    def dense(self) -> Moments:
        return Adam()

    @override
    def slots(self, columns: Columns) -> Slots:
        return {"exp_avg": Slot("r n")}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        M = s["exp_avg"].mul_(ctx.beta1).add_(R)
        X = torch.add(R, M, alpha=ctx.beta1) if self.nesterov else M
        wide = X.double()
        K = yield Sum(wide @ wide.mT, over="columns")
        del wide  # of all matrices that wait for their sums
        root = inverse_root(K, ctx.columns.n, torch.finfo(X.dtype).eps)
        root *= ADAMS_RMS * sqrt(max(ctx.m, ctx.columns.n))
        return (root @ X.double()).to(X.dtype)

    @override
    def momentum(self, s: State, ctx: Context) -> Tensor:
        return s["exp_avg"] * (1 - ctx.beta1)  # M is a sum

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        s["exp_avg"].copy_(C @ s["exp_avg"])


def inverse_root(K: Tensor, n: int, eps: float) -> Tensor:
    """Return K^-1/2 on the directions that are known, and zero on the others.

    X is known to eps of its entries. Independent errors of size e make a matrix of norm e (sqrt(r) + sqrt(n)) at most,
    and no entry is larger than the largest singular value: one below eps (sqrt(r) + sqrt(n)) times that is noise.

    Args:
        K: (..., r, r) float64 Gram matrix of X (..., r, n).
        n: columns of X, on all processes.
        eps: relative precision of the entries of X.
    """
    values, Q = torch.linalg.eigh(K)  # ascending
    noise = eps * (sqrt(K.shape[-1]) + sqrt(n))
    known = values > noise**2 * values[..., -1:].clamp_min(0)
    roots = torch.where(known, values, 1.0).rsqrt() * known
    root: Tensor = (Q * roots.unsqueeze(-2)) @ Q.mT
    return root
