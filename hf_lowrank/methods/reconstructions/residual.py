"""The residual of the gradient as it is: SUMO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import ColumnNorms, Context, Update
from hf_lowrank.methods.parts import Reconstruction
from hf_lowrank.state.slots import State


@dataclass(frozen=True)
class Residual(Reconstruction, key="residual"):
    """U = alpha P N + G - P R: what the subspace leaves out is stepped along as SGD does, at the same learning rate.

    N has a size of its own and the residual that of the gradient, so what it is worth depends on the gradient's size,
    and on clipping. It is U = P Z + G, and at r = m nothing is left over.

    State: none.

    References:
        SUMO, arXiv 2505.24749, Algorithm 1, block 4.

    Differs from the authors' code: that was not read. The paper has no alpha; here it is a factor of the subspace's
    part, and 1 in the row `sumo`.
    """

    needs_gradient: ClassVar[bool] = True
    needs_orthonormal: ClassVar[bool] = True
    by_columns: ClassVar[bool] = True

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Update:
        if ctx.r == ctx.m:  # no residual
            return Update(N, ctx.scale)
        factor = 1 / c_t  # the engine multiplies all by Adam's bias correction
        d = R.new_full((*R.shape[:-2], R.shape[-1]), factor)  # (..., n)
        return Update(torch.add(N, R, alpha=-factor / ctx.scale), ctx.scale, d)
