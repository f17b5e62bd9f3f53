"""One moment: low-rank SGD with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.parts import Moments
from hf_lowrank.state.slots import Slot, Slots, State


@dataclass(frozen=True)
class Momentum(Moments, key="momentum"):
    """M <- b1 M + (1 - b1) R;  N = M, with no bias correction.

    References:
        I3S, arXiv 2502.05790, Algorithm 4. (Its proofs weight the new gradient by beta1, Lemma A.2: their beta1 is one
        minus this one.)

    Differs from the authors' code: none was released for I3S. GoLore's carries M along only after its switch; here
    every refresh does what `on_refresh` says.
    """

    elementwise: ClassVar[bool] = True
    transports: ClassVar[tuple[str, ...]] = ("keep", "rotate", "reset")
    without: ClassVar[tuple[str, ...]] = ("eps_place",)

    @override
    def slots(self, columns: Columns) -> Slots:
        return {"exp_avg": Slot("r n")}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        return s["exp_avg"].lerp_(R, 1 - ctx.beta1).clone()

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        s["exp_avg"].copy_(C @ s["exp_avg"])
