"""One moment: low-rank SGD with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.parts import Moments
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.sums import Summing


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

    def slots(self, shape: tuple[int, ...], columns: Columns) -> Slots:
        """See `Moments.slots`."""
        return {"exp_avg": Slot(shape, "moment")}

    def update(self, s: State, R: Tensor, ctx: Context) -> Summing[Tensor]:
        """See `Moments.update`."""
        yield from ()
        return s["exp_avg"].lerp_(R, 1 - ctx.beta1).clone()

    def transport_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        """See `Moments.transport_`."""
        if how == "rotate":
            s["exp_avg"].copy_(C @ s["exp_avg"])
        elif how == "reset":
            s["exp_avg"].zero_()
            s["moment_step"].zero_()
