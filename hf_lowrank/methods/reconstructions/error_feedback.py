"""What a changing subspace leaves out, remembered: LDAdam's generalized error feedback."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Carried, ColumnNorms, Context, Update
from hf_lowrank.methods.options import choice
from hf_lowrank.methods.parts import Reconstruction
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.bases import Basis


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
    @override
    def needs_gradient(self) -> bool:  # type: ignore[override]
        return self.error_feedback != "off"

    @property
    @override
    def needs_momentum(self) -> bool:  # type: ignore[override]
        return self.needs_gradient

    @property
    @override
    def needs_orthonormal(self) -> bool:  # type: ignore[override]
        return self.needs_gradient

    @property
    @override
    def replaces_gradient(self) -> bool:  # type: ignore[override]
        return self.needs_gradient

    @override
    def slots(self) -> Slots:
        return {"error": Slot("m n", held=True, encoding=self.error_feedback)} if self.needs_gradient else {}

    @override
    def absorb(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return (G + s["error"] if self.needs_gradient else G), {}

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Update:
        return Update(N, ctx.scale)

    @override
    def change_basis_(self, s: State, G: Tensor, old: Carried, new: Carried, ctx: Context) -> None:
        weight = ctx.beta1 / (1 - ctx.beta1)
        old.add_to_(s["error"], weight)
        new.add_to_(s["error"], -weight)

    @override
    def after_step_(self, s: State, G: Tensor, R: Tensor, basis: Basis) -> None:
        if self.needs_gradient:
            s["error"].copy_(G)
            basis.accumulate_(s["error"], R, -1.0)
