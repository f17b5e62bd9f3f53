"""Orthogonalised momentum whose neurons take steps of one size: NorMuon."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.moments.muon import ADAMS_RMS, Orthogonalised
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.sums import Asking, Sum


@dataclass(frozen=True)
class NorMuon(Orthogonalised, key="normuon"):
    """O = U V^T of the momentum as in Muon;  v_j <- b2 v_j + (1 - b2) mean_i O_ij^2 for every column;
    O^_ij = O_ij / (sqrt(v_j) + eps);  N = 0.2 sqrt(r n) O^ / ||O^||_F.

    The columns are the outputs (neurons) where the weight is tall, square or seen whole; inputs where a wide one is
    projected. Dense parameters take Adam.

    State: rn + n.

    References:
        NorMuon, arXiv 2510.05491, Algorithm 1.

    Differs from the authors' code: N has the size of Adam's step; there it has the norm of O, times sqrt(max(1,
    outputs / inputs)). Momentum and b2 are both 0.95 there, and eps 1e-10: here they are those of the group. See Muon
    for how O is had.
    """

    @override
    def slots(self, columns: Columns) -> Slots:
        return {**super().slots(columns), "neuron_sq": Slot("n", values="exact")}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        O = yield from self.orthogonal(s, R, ctx)  # noqa: E741
        squares = O.square().sum(-2)
        v = s["neuron_sq"].lerp_(squares / R.shape[-2], 1 - ctx.beta2)
        inverse = (v.sqrt() + ctx.eps).reciprocal_()
        total = yield Sum((squares * inverse.square()).sum(-1), over="columns")
        size = ADAMS_RMS * sqrt(R.shape[-2] * ctx.columns.n) * total.clamp_min(torch.finfo(R.dtype).tiny).rsqrt()
        return O.mul_((inverse * size.unsqueeze(-1)).unsqueeze(-2))
