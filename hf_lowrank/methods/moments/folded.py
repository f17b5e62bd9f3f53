"""Adam's moments of folded gradients: FOAM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.moments.adam import Adam, bias_correction
from hf_lowrank.methods.options import choice
from hf_lowrank.methods.parts import Moments
from hf_lowrank.state.slots import Slots, State


@dataclass(frozen=True)
class FoldedAdam(Moments, key="folded_adam"):
    """M <- b1 M + (1 - b1) fold(G);  V <- b2 V + (1 - b2) fold(G∘G), or fold(G)∘fold(G).

    R holds both folds, (..., 2r, n); the direction is M above sqrt(V) + eps sqrt(1 - b2^t) taken apart, (..., 2r, n):
    what is lost by folding comes back in the reconstruction `unfold`. Dense parameters take plain Adam.

    References:
        FOAM, arXiv 2512.07112; the rule: its code.

    Differs from the authors' code: betas are Trainer's, where its script leaves them at the defaults of the optimizer.
    The squares are folded, as the code does; `fold_of=gradient` is how summaries of the paper write it.
    """

    composable: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = ("keep",)

    fold_of: str = choice("squares", "gradient", help="FOAM: V from fold(G∘G) or from fold(G)∘fold(G)")

    @property
    @override
    def dense(self) -> Moments:
        return Adam()

    @override
    def slots(self, columns: Columns) -> Slots:
        return Adam().slots(columns)

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        """Returns M and V, one above the other."""
        gradient, squares = R.chunk(2, -2)
        M = s["exp_avg"].lerp_(gradient, 1 - ctx.beta1)
        V = s["exp_avg_sq"].lerp_(squares if self.fold_of == "squares" else gradient.square(), 1 - ctx.beta2)
        return torch.cat([M, V], -2)

    @override
    def step_scale(self, ctx: Context) -> float:
        return bias_correction(ctx)
