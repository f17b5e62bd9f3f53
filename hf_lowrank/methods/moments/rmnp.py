"""One moment whose columns are brought to one size, in the place of its polar factor: RMNP.

Legend: R gradient (..., r, n); its columns are the outputs of a weight that is seen whole · M first moment (..., r, n)
· X what is normalised, M or b1 M + (1 - b1) R · N direction (..., r, n).
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
from hf_lowrank.methods.moments.muon import ADAMS_RMS, NESTEROV
from hf_lowrank.methods.options import again
from hf_lowrank.methods.parts import Moments
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors import kernels


@dataclass(frozen=True)
class RMNP(Moments, key="rmnp"):
    """M <- b1 M + (1 - b1) R;  N_j = 0.2 sqrt(r) X_j / ||X_j|| for every column j, r entries each.

    That is Muon's step where the outputs of X are orthogonal to each other: then (X^T X)^-1/2, which Muon takes from
    products of matrices, is diagonal. A column of zeros stays so.

    State: rn. Dense parameters take Adam.

    References:
        RMNP, arXiv 2603.20527.

    Differs from the authors' code: columns have the RMS of Adam's step and of Muon's here, 0.2, in the place of unit
    norm times sqrt(max(1, outputs / inputs)), so that the rate is of Adam's order; its floor of 1e-12 under the norm
    is left out, so that the size of the gradients does not matter.
    """

    nesterov: bool = again(NESTEROV)

    transports: ClassVar[tuple[str, ...]] = ("keep", "rotate", "reset")

    @property
    @override
    def dense(self) -> Moments:
        return Adam()

    @override
    def slots(self, columns: Columns) -> Slots:
        return {"exp_avg": Slot("r n")}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        M = s["exp_avg"].lerp_(R, 1 - ctx.beta1)
        X = torch.lerp(R, M, ctx.beta1) if self.nesterov else M
        norms = kernels.column_norms(X)
        factor = torch.where(norms > 0, norms, torch.inf).reciprocal_().mul_(ADAMS_RMS * sqrt(X.shape[-2]))
        return X * factor.unsqueeze(-2)

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        s["exp_avg"].copy_(C @ s["exp_avg"])
