"""The gradient with columns of one size: SCALE's step of the body."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import ColumnNorms, Context, Update
from hf_lowrank.methods.parts import Reconstruction
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import kernels


@dataclass(frozen=True)
class UnitColumns(Reconstruction, key="unit_columns"):
    """U = alpha G diag(d), d_j = sqrt(m) / ||G_j||: every column has unit RMS, and one of zeros stays so.

    Whatever there is of moments is not looked at. The columns are the outputs of a weight that is seen whole.

    References:
        SCALE, arXiv 2506.16659, Algorithm 1, for all layers but the last.

    Differs from the authors' code: its floor of 1e-8 under the RMS is left out, so that the size of the gradients does
    not matter. (The paper prints a unit norm; unit RMS is the code's.)
    """

    needs_gradient: ClassVar[bool] = True
    by_columns: ClassVar[bool] = True
    composable: ClassVar[bool] = False

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Update:
        squares = norms.gradient()  # (..., n)
        return Update(d=kernels.divisor(squares).rsqrt_().mul_(ctx.scale * sqrt(ctx.m)))
