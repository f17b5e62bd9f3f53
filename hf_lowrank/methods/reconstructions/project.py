"""The plain way back: GaLore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import ColumnNorms, Context, Update
from hf_lowrank.methods.parts import Reconstruction
from hf_lowrank.state.slots import State


@dataclass(frozen=True)
class Project(Reconstruction, key="project"):
    """U = alpha P N.

    References:
        GaLore, arXiv 2403.03507, Algorithm 2; I3S, arXiv 2502.05790, eq. 1.

    Differs from the authors' code: the product is added to the weight as it is computed, without a matrix of the
    weight's size; weights decay before the step instead of after it.
    """

    by_columns: ClassVar[bool] = True
    plain: ClassVar[bool] = True

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Update:
        return Update(N, ctx.scale)
