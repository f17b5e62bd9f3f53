"""What a changing subspace leaves out, remembered: LDAdam's generalized error feedback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import choice
from hf_lowrank.methods.parts import Add, Facts, Reconstruction, Update
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.sums import Summing


@dataclass(frozen=True)
class ErrorFeedback(Reconstruction, key="error_feedback"):
    """The rule sees a = G + E in the place of G;  E <- a - P R + b1/(1-b1) (P_old M - P C M);  U = alpha P N.

    What the projection of a and the transport of M leave out is in E and comes back later: with V held at 1 the steps
    add up to those of full momentum. The two changes are orthogonal to P, so E takes the second one at the change of
    basis and the first after the step.

    State: mn for E, in a number format of its own.

    References:
        LDAdam, arXiv 2410.16103, Algorithm 1 (generalized error feedback).

    Differs from the authors' code: E has its own buffer instead of the gradient's, so that zero_grad, clipping and
    accumulation leave it alone.
    """

    error_feedback: str = choice(
        "fp32", "bf16", "8bit", "off", help="LDAdam: number format of the error buffer, or off"
    )

    @property
    def needs_gradient(self) -> bool:  # type: ignore[override]
        """See `Reconstruction.needs_gradient`."""
        return self.error_feedback != "off"

    def slots(self, batch: tuple[int, ...], m: int, n: int, r: int, piece: tuple[int, int]) -> Slots:
        """See `Reconstruction.slots`."""
        return {"error": Slot((*batch, *piece), form=self.error_feedback)} if self.needs_gradient else {}

    def absorb(self, s: State, G: Tensor, ctx: Context) -> Summing[tuple[Tensor, dict[str, Tensor]]]:
        """See `Reconstruction.absorb`."""
        yield from ()
        return (G + s["error"] if self.needs_gradient else G), {}

    def combine(self, s: State, facts: Facts, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Summing[Update]:
        """See `Reconstruction.combine`."""
        yield from ()
        return Update(N, ctx.scale)

    def moved_(self, s: State, momentum: Callable[[], Tensor], add_: Add, sign: float, ctx: Context) -> None:
        """See `Reconstruction.moved_`."""
        if self.needs_gradient:
            add_(s["error"], momentum(), sign * ctx.beta1 / (1 - ctx.beta1))

    def after_(self, s: State, G: Tensor, R: Tensor, add_: Add) -> None:
        """See `Reconstruction.after_`."""
        if self.needs_gradient:
            s["error"].copy_(G)
            add_(s["error"], R, -1.0)
