"""Adam on a natural gradient from a window of projected gradients: Natural GaLore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.moments.adam import Adam
from hf_lowrank.methods.options import choice, integer, number
from hf_lowrank.methods.parts import Moments
from hf_lowrank.state.slots import Slot, Slots, State, counter
from hf_lowrank.tensors.random import float64
from hf_lowrank.tensors.sums import Asking, Sum


@dataclass(frozen=True)
class NaturalAdam(Moments, key="natural_adam"):
    """g = vec(R), H the last `history` of them (this one included), F = lambda I + H H^T: Adam on lambda F^-1 g.

    By Woodbury, g being the column e of H, F^-1 g = H z with (lambda I + H^T H) z = e: one small solve per matrix.
    At a refresh the window is rotated into the new basis, or cleared, whatever becomes of the moments.

    State: history x rn beside Adam's 2rn. Dense parameters take plain Adam.

    References:
        Natural GaLore, arXiv 2410.16029, section 4 (the Fisher's factor 1/s is dropped there too).

    Differs from the authors' code: damping is relative to the window's mean squared norm by default, so that scaling
    all gradients changes nothing (an absolute one switches the method off as gradients shrink), and the step is then
    lambda F^-1 R, since F^-1 makes the smallest gradients the largest, in whose units Adam would go on; one side is
    projected, as the paper's text says; the window does not outlive its basis; the default history is 4 instead of
    20, which would be ten times Adam's moments.
    """

    history: int = integer(4, minimum=1, help="Natural GaLore: projected gradients in the window")
    damping: float = number(0.1, above=0.0, help="Natural GaLore: lambda, relative or absolute (the paper's is 1e-3)")
    damping_kind: str = choice(
        "relative", "absolute", help="Natural GaLore: in units of the mean squared norm of the window, or as it is"
    )
    window: str = choice("rotate", "clear", help="Natural GaLore: what becomes of the window at a refresh")

    of_gradients: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = Adam.transports

    @property
    @override
    def dense(self) -> Moments:
        return Adam()

    @override
    def slots(self, columns: Columns) -> Slots:
        return {**Adam().slots(columns), "window": Slot(f"{self.history} r n"), "seen": counter()}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        H, seen = s["window"], int(s["seen"])
        place = seen % self.history
        H.select(-3, place).copy_(R)
        s["seen"].add_(1)
        rows = H.flatten(-2)  # (..., history, rn)
        gram = yield Sum(float64(rows @ rows.mT), over="columns")
        norms = gram.diagonal(dim1=-2, dim2=-1)
        damping = torch.full_like(norms[..., 0], self.damping)
        if self.damping_kind == "relative":
            damping = damping * norms.sum(-1) / min(seen + 1, self.history)
        damping = damping.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        # a relative damping is the unit of the step; an absolute one is left in F^-1, as the authors have it
        unit = 1.0 if self.damping_kind == "relative" else damping
        system = torch.eye(self.history, dtype=gram.dtype, device=gram.device) + gram / damping[..., None]
        chosen = torch.zeros_like(norms)
        chosen[..., place] = 1  # g is a column of H
        z = torch.linalg.solve_ex(system, chosen)[0] / unit  # (..., history)
        natural = (z.to(R).unsqueeze(-2) @ rows).view(R.shape)
        return Adam().update(s, natural, ctx)

    @override
    def step_scale(self, ctx: Context) -> float:
        return Adam().step_scale(ctx)

    @override
    def transport_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        super().transport_(s, C, how, ctx)
        if self.window == "clear" or how == "reset":
            s["window"].zero_()
            s["seen"].zero_()
        else:
            s["window"].copy_(C.unsqueeze(-3) @ s["window"])

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        Adam().rotate_(s, C, how, ctx)
