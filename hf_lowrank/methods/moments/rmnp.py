"""One moment whose columns are brought to one size, in the place of its polar factor: RMNP.

Legend: R gradient (..., r, n); its columns are the outputs of a weight that is seen whole · M first moment (..., r, n)
· X what is normalised, M or b1 M + (1 - b1) R · N direction (..., r, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.moments.muon import ADAMS_RMS, OneMoment
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import kernels


@dataclass(frozen=True)
class RMNP(OneMoment, key="rmnp"):
    """M <- b1 M + (1 - b1) R;  N_j = 0.2 sqrt(r) X_j / ||X_j|| for every column j, r entries each.

    X is b1 M + (1 - b1) R in the row `rmnp` (`nesterov`, as its authors' code has it), else M, as the paper prints it.

    That is Muon's step where the outputs of X are orthogonal to each other: then (X^T X)^-1/2, which Muon takes from
    products of matrices, is diagonal. A column of zeros stays so.

    State: rn. Dense parameters take Adam.

    References:
        RMNP, arXiv 2603.20527.

    Differs from the authors' code: columns have the RMS of Adam's step and of Muon's here, 0.2, in the place of unit
    norm times sqrt(max(1, outputs / inputs)), so that the rate is of Adam's order; its momentum is 0.95, here it is
    the first of betas, 0.9 where nothing is said (`momentum`); its floor of 1e-12 under the norm is left out, so that
    the size of the gradients does not matter.
    """

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        X = self.taken(s["exp_avg"], R, ctx)
        norms = kernels.column_norms(X)
        factor = kernels.divisor(norms).reciprocal_().mul_(ADAMS_RMS * sqrt(X.shape[-2]))
        return X * factor.unsqueeze(-2)
