"""One moment: low-rank SGD with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.options import choice
from hf_lowrank.methods.parts import Moments
from hf_lowrank.methods.registry import CARRIED
from hf_lowrank.state.slots import Slot, Slots, State


@dataclass(frozen=True)
class Momentum(Moments, key="momentum"):
    """M <- b1 M + (1 - b1) R;  N = M, with no bias correction.

    M is zero before the first step, and (1 - b1) R after it. With `first_momentum=gradient`, the default of
    `golore_msgd`, it is R then, as torch.optim.SGD has it too: the first steps are not shorter than the later ones.

    References:
        I3S, arXiv 2502.05790, Algorithm 4, which carries M along (`on_refresh=rotate`, the default of its rows). (Its
        proofs weight the new gradient by beta1, Lemma A.2: their beta1 is one minus this one.) The first momentum:
        GoLore's code.

    Differs from the authors' code: none was released for I3S. GoLore's carries M along only after its switch; here
    every refresh does what `on_refresh` says. It has a dampening of its own, by default 0.9 as its momentum: there M
    <- b1 M + 0.1 R whatever b1 is.
    """

    elementwise: ClassVar[bool] = True
    images: ClassVar[int] = 0
    transports: ClassVar[tuple[str, ...]] = CARRIED
    without: ClassVar[tuple[str, ...]] = ("eps_place",)

    first_momentum: str = choice(
        "damped", "gradient", help="momentum SGD: M after the first step, (1 - beta1) R or R itself"
    )

    @override
    def slots(self, columns: Columns) -> Slots:
        return {"exp_avg": Slot("r n")}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        whole = ctx.moment_step == 1 and self.first_momentum == "gradient"
        return s["exp_avg"].lerp_(R, 1.0 if whole else 1 - ctx.beta1)

    @override
    def mean_gradient(self, s: State, ctx: Context) -> Tensor:
        return s["exp_avg"] if self.first_momentum == "gradient" else super().mean_gradient(s, ctx)

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        s["exp_avg"].copy_(C @ s["exp_avg"])
