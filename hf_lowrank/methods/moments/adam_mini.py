"""Adam with one second moment per block: Adam-mini."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.moments.adam import bias_correction, eps_of_root
from hf_lowrank.methods.options import integer
from hf_lowrank.methods.parts import Moments
from hf_lowrank.methods.registry import CARRIED
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.sums import Asking, Sum


@dataclass(frozen=True)
class AdamMini(Moments, key="adam_mini"):
    """M <- b1 M + (1 - b1) R;  v_b <- b2 v_b + (1 - b2) mean(R∘R over block b);  N = M / (sqrt(v) + eps sqrt(1 -
    b2^t)).

    A block must lie on the axis that survives the projection. Where the columns of R are outputs (the weight is tall
    or square) that is Adam-mini's own partition: one v per output neuron, one per head for the queries and keys of
    attention where `head_dim` is known. Where they are inputs the outputs are mixed by the basis: one v per row of R,
    that is per direction of the subspace. Dense matrices have one v per row of the weight (token), vectors one per
    element.

    State on R: rn + n, rn + n/head_dim or rn + r.

    References:
        Adam-mini, arXiv 2406.16793, Algorithm 1 and its partition for transformers. On a projected gradient: I3S,
        arXiv 2502.05790, Table 1, which does not print the rule; the rows are our choice.

    Differs from the authors' code: norms keep Adam's second moment instead of one scalar. Weights are taken as
    (outputs, inputs), which transformers' Conv1D is not: there the blocks are inputs.
    """

    transports: ClassVar[tuple[str, ...]] = CARRIED

    head_dim: int = integer(
        0, minimum=0, help="Adam-mini: size of an attention head; 0: one v per neuron there too", fact="head_dim"
    )

    @override
    def slots(self, columns: Columns) -> Slots:
        if columns.vector or columns.block == 1:
            blocks = "n"
        else:
            blocks = f"{columns.n // columns.block}" if columns.block else "r"
        return {"exp_avg": Slot("r n"), "block_sq": Slot(blocks, values="exact")}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        M, v, block = s["exp_avg"].lerp_(R, 1 - ctx.beta1), s["block_sq"], ctx.columns.block
        square = R.square()
        if R.dim() < 2:
            spread = v.lerp_(square, 1 - ctx.beta2)
        elif block == 0:
            total = yield Sum(square.sum(-1), over="columns")
            spread = v.lerp_(total / ctx.columns.n, 1 - ctx.beta2).unsqueeze(-1)
        elif block == 1:
            spread = v.lerp_(square.mean(-2), 1 - ctx.beta2).unsqueeze(-2)
        else:
            head = (torch.arange(R.shape[-1], device=R.device) + ctx.columns.start) // block
            total = yield Sum(torch.zeros_like(v).index_add_(-1, head, square.sum(-2)), over="columns")
            v.lerp_(total / (R.shape[-2] * block), 1 - ctx.beta2)
            spread = v.index_select(-1, head).unsqueeze(-2)
        return M / (spread.sqrt() + eps_of_root(ctx))

    @override
    def step_scale(self, ctx: Context) -> float:
        return bias_correction(ctx)

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        M, v = s["exp_avg"], s["block_sq"]
        M.copy_(C @ M)
        if ctx.columns.block == 0:
            v.copy_((C.square() @ v.unsqueeze(-1)).squeeze(-1))
