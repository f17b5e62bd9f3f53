"""A second moment kept as the largest of every row and of every column: SM3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.moments.factored import TINY
from hf_lowrank.methods.parts import Moments
from hf_lowrank.methods.registry import CARRIED
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.sums import Asking, Max


@dataclass(frozen=True)
class SM3(Moments, key="sm3"):
    """V_ij = min(row_i, col_j) + R_ij^2;  row_i <- max_j V_ij;  col_j <- max_i V_ij;
    M <- b1 M + (1 - b1) R / sqrt(V);  N = M.

    row_i and col_j are never less than the sum of the squares that any of their entries has had: steps only get
    smaller, as Adagrad's do. A vector is Adagrad.

    State on R: rn + r + n. Where a refresh rotates M the largest sums stay.

    References:
        SM3, arXiv 1901.11150, Algorithm SM3-II.

    Differs from the authors' code: momentum is Trainer's adam_beta1; tensors of more than two axes are taken as
    matrices, with their first axis as columns.
    """

    of_gradients: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = CARRIED
    without: ClassVar[tuple[str, ...]] = ("eps_place",)

    @override
    def slots(self, columns: Columns) -> Slots:
        if columns.vector:
            return {"exp_avg": Slot("r n"), "col": Slot("n", values="exact")}
        return {"exp_avg": Slot("r n"), "row": Slot("r", values="exact"), "col": Slot("n", values="exact")}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        if R.dim() < 2:
            V = s["col"].addcmul_(R, R) + TINY
        else:
            row, col = s["row"], s["col"]
            V = torch.minimum(row.unsqueeze(-1), col.unsqueeze(-2)).addcmul_(R, R)
            here = V.amax(-1) if V.shape[-1] else torch.zeros_like(row)  # a process may hold no column
            largest = yield Max(here, over="columns")
            row.copy_(largest)
            col.copy_(V.amax(-2))
            V += TINY
        return s["exp_avg"].lerp_(V.rsqrt_().mul_(R), 1 - ctx.beta1)

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        s["exp_avg"].copy_(C @ s["exp_avg"])
