"""The gradient, or its momentum, with outputs of one size: what SCALE does.

Legend: R gradient of a dense parameter (r, n), its columns the first axis of the weight · M first moment (r, n) · N
direction (r, n). Columns are outputs, but for those of an embedding, whose outputs are the rows.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.moments.adam import Adam
from hf_lowrank.methods.moments.momentum import Momentum
from hf_lowrank.methods.parts import Moments
from hf_lowrank.state.slots import Slots, State
from hf_lowrank.tensors import kernels
from hf_lowrank.tensors.sums import Asking, Sum


class Normalised(Moments):
    """N has unit RMS for every output of the weight; vectors, which have no other axis, take Adam."""

    composable: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = ("keep",)
    images: ClassVar[int] = 2  # the direction, and moments in fewer bits decoded

    @abstractmethod
    def direction(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        """Take R into the state, in place, and return what is normalised."""

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        if ctx.columns.vector:
            return Adam().update(s, R, ctx)
        X = self.direction(s, R, ctx)
        if ctx.columns.tokens:
            squares = yield Sum(torch.linalg.vector_norm(X, dim=-1).square(), over="columns")
            norm, count = squares.sqrt().unsqueeze(-1), ctx.columns.n
        else:
            norm, count = torch.linalg.vector_norm(X, dim=-2, keepdim=True), X.shape[-2]
        return X / kernels.divisor(norm) * sqrt(count)

    @override
    def step_scale(self, ctx: Context) -> float:
        return Adam().step_scale(ctx) if ctx.columns.vector else 1.0


@dataclass(frozen=True)
class ColumnNorm(Normalised, key="column_norm"):
    """N_o = sqrt(d) R_o / ||R_o|| for every output o, d entries each: N has unit RMS, so its rate is of Adam's order.

    An output is a row of a weight (outputs, inputs), and a column of an embedding's table (tokens, hidden). One whose
    gradient is zero is not moved.

    State: none. Vectors take Adam.

    References:
        SCALE, arXiv 2506.16659, Algorithm 1, for all layers but the last.

    Differs from the authors' code: its floor of 1e-8 under the RMS is left out, so that the size of the gradients does
    not matter. (The paper prints a unit norm; unit RMS is the code's.) Weights are taken as (outputs, inputs), which
    transformers' Conv1D is not.
    """

    @override
    def slots(self, columns: Columns) -> Slots:
        return Adam().slots(columns) if columns.vector else {}

    @override
    def direction(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        return R


@dataclass(frozen=True)
class MomentumColumnNorm(Normalised, key="momentum_column_norm"):
    """M <- b1 M + (1 - b1) R;  N_o = sqrt(d) M_o / ||M_o|| for every output o, as `column_norm` has it of R.

    State: one moment. Vectors take Adam.

    References:
        SCALE, arXiv 2506.16659, Algorithm 1, for the last layer.

    Differs from the authors' code: as `column_norm` does.
    """

    @override
    def slots(self, columns: Columns) -> Slots:
        return Adam().slots(columns) if columns.vector else Momentum().slots(columns)

    @override
    def direction(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        return s["exp_avg"].lerp_(R, 1 - ctx.beta1)
