"""Rules that keep nothing: the gradient normalised, or whitened.

Legend: R gradient (..., r, n); its columns are the outputs of a weight that is seen whole.
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
from hf_lowrank.methods.moments.muon import ORTHOGONALIZE, STEPS, adjusted, orthogonal
from hf_lowrank.methods.options import again, integer
from hf_lowrank.methods.parts import Moments
from hf_lowrank.methods.registry import CARRIED
from hf_lowrank.state.slots import Slots, State
from hf_lowrank.tensors import kernels
from hf_lowrank.tensors.sums import Asking, Sum


class Stateless(Moments):
    """Moments that keep nothing; what has no matrix takes Adam."""

    keeps_momentum: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = CARRIED

    @property
    @override
    def dense(self) -> Moments:
        return Adam()

    @override
    def slots(self, columns: Columns) -> Slots:
        return {}

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        """There is nothing to carry."""


@dataclass(frozen=True)
class Sinkhorn(Stateless, key="sinkhorn"):
    """N: R with columns and rows of unit RMS, by normalising the ones and the others in turn, `iterations` times.

    References:
        SinkGD: Gradient Multi-Normalization for Stateless and Scalable LLM Training, arXiv 2502.06742, Algorithm 3
        (SR-Sinkhorn).

    Differs from the authors' code: that was not read. A row or column of zeros stays so. Others who have written it
    multiply the rate by 0.05; here `scale` is 1, and the rate is that of the step.
    """

    iterations: int = integer(5, minimum=1, help="SinkGD: how many times rows and columns are normalised")

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        N = R
        for _ in range(self.iterations):
            N = N / kernels.divisor(torch.linalg.vector_norm(N, dim=-2)).unsqueeze(-2) * sqrt(R.shape[-2])
            squares = yield Sum(N.square().sum(-1), over="columns")
            N.div_((kernels.divisor(squares.sqrt()) / sqrt(ctx.columns.n)).unsqueeze(-1))
        return N


@dataclass(frozen=True)
class Whitened(Stateless, key="whitened"):
    """N = 0.2 sqrt(max(m, n)) (X X^T)^-1/2 X, where X is R, short side first, its rows brought to mean 0, variance 1.

    The rows of a square X add up to nothing, a direction that only an exact or fp32 whitening tells from rounding.

    References:
        SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training, arXiv 2412.13148, Algorithm 1.

    Differs from the authors' code: none was read, nor the paper's text, but notes on it. The size is that of Adam's
    step (see Muon); the whitening is Muon's, by its iteration or exact.
    """

    orthogonalize: str = again(ORTHOGONALIZE)
    ns_steps: int = again(STEPS)

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        n = ctx.columns.n
        if R.shape[-2] > n:
            X = R - R.mean(-2, keepdim=True)
            X.div_(kernels.divisor(torch.linalg.vector_norm(X, dim=-2)).unsqueeze(-2))
        else:
            total = yield Sum(R.sum(-1), over="columns")
            X = R - (total / n).unsqueeze(-1)
            squares = yield Sum(X.square().sum(-1), over="columns")
            X.div_(kernels.divisor(squares.sqrt()).unsqueeze(-1))
        factor = adjusted("match_rms_adamw", ctx)
        white = yield from orthogonal(X, self.orthogonalize, self.ns_steps, ctx.columns, factor)
        return white
