"""No moment: plain SGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.parts import Moments
from hf_lowrank.state.slots import Slots, State


@dataclass(frozen=True)
class Sgd(Moments, key="sgd"):
    """N = R, with no state.

    References:
        A Stochastic Approximation Method (Robbins and Monro, 1951), at the rates of a schedule.

    Differs from the authors' code: there is none.
    """

    composable: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    images: ClassVar[int] = 0
    transports: ClassVar[tuple[str, ...]] = ("keep",)

    @override
    def slots(self, columns: Columns) -> Slots:
        return {}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        return R
