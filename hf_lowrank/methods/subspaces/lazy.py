"""The dominant subspace, refreshed the less often the less it changes: Q-GaLore."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import choice, integer, number
from hf_lowrank.methods.subspaces.decomposed import Decomposed
from hf_lowrank.methods.subspaces.dominant import dominant
from hf_lowrank.state.slots import Slot, Slots, State, counter


@dataclass(frozen=True)
class Lazy(Decomposed, key="lazy"):
    """P = U[:, :r], at intervals of its own for every matrix.

    When the last `queue_size` overlaps ||P_old^T P_new||^2 / r have a mean of at least `threshold` the interval
    doubles, up to `longest` times the group's; one overlap below the threshold halves it again, down to the group's. A
    change of the interval starts a new count.

    References:
        Q-GaLore, arXiv 2407.08296, sections 3.2 (lazy subspaces) and 3.3 (4-bit basis).

    Differs from the authors' code: the overlap of the subspaces decides, not the signed cosine of the first vectors;
    the interval has a cap and a way back; the 4-bit codes are packed, symmetric, and come from fp32. Its 8-bit Adam is
    `state_format=8bit`, the row `q_galore_adamw_8bit`; here moments are fp32 where nothing is said. INT8 weights are
    not offered: a weight that autograd, clipping, DDP and save_pretrained all see as a parameter must be floating
    point, and one that is not would have to be replaced in every one of them.
    """

    queue_size: int = integer(5, minimum=1, help="Q-GaLore: overlaps that are looked at")
    threshold: float = number(0.4, help="Q-GaLore: mean overlap from which the interval doubles")
    longest: int = integer(16, minimum=1, help="Q-GaLore: longest interval, in units of update_proj_gap")
    refresh: str = choice("gram", "svd", "randomized", "power", help="see `dominant`")

    @override
    def slots(self) -> Slots:
        overlaps = Slot(f"{self.queue_size}", values="exact", shared=True, host=True)
        return {**super().slots(), "overlaps": overlaps, "known": counter(), "doublings": counter()}

    @override
    def choose(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        return dominant(G, s["basis"], self.refresh, ctx)

    @override
    def interval_(self, s: State, gap: int, overlap: float) -> int:
        doublings, known = int(s["doublings"]), int(s["known"])
        if overlap >= 0:
            s["overlaps"].copy_(torch.cat([s["overlaps"][1:], s["overlaps"].new_tensor([overlap])]))
            known = min(known + 1, self.queue_size)
            full = known == self.queue_size
            if overlap < self.threshold and doublings:
                doublings, known = doublings - 1, 0
            elif full and float(s["overlaps"].mean()) >= self.threshold and 2**doublings < self.longest:
                doublings, known = doublings + 1, 0
        s["doublings"].fill_(doublings)
        s["known"].fill_(known)
        return int(gap * min(2**doublings, self.longest))
