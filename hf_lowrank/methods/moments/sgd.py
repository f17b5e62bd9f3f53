"""No moment at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.parts import Moments
from hf_lowrank.methods.registry import CARRIED
from hf_lowrank.state.slots import Slots, State


@dataclass(frozen=True)
class Sgd(Moments, key="sgd"):
    """N = R. There is no state.

    References:
        LOMO, arXiv 2306.09782, which steps so during backward.

    Differs from the authors' code: decay is applied, a schedule is followed and runs resume; transformers' `lomo`
    drops weight_decay and max_grad_norm without a word.
    """

    elementwise: ClassVar[bool] = True
    keeps_momentum: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = CARRIED
    without: ClassVar[tuple[str, ...]] = ("eps_place",)
    images: ClassVar[int] = 0

    @override
    def slots(self, columns: Columns) -> Slots:
        return {}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        return R

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        """There is nothing to carry."""
