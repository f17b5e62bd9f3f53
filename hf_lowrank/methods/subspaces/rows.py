"""Rows of the gradient instead of mixtures of them: Grass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import choice
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors import kernels, random
from hf_lowrank.tensors.bases import Basis, SelectedRows


@dataclass(frozen=True)
class Rows(Subspace, key="rows"):
    """P^T selects r rows of the gradient and scales them: R = scale∘G[index].

    * `top`: the r rows of the largest norm; what changes the gradient least, but the same rows win for ever
    * `norm` (default): r draws with replacement, row j with probability q_j = ||G_j|| / sum_i ||G_i||, scale
      1/sqrt(r q_j), so that E[P P^T] = I; of all q this one has the least E||P P^T G - G||^2
    * `norm_without`: r draws without replacement with weight ||G_j||, scale 1
    * `uniform`: r draws with replacement, q_j = 1/m, scale sqrt(m/r), E[P P^T] = I
    * `uniform_without`: r draws without replacement, all alike, scale 1

    Indices are kept in ascending order. Rows of different refreshes have nothing to do with each other, so moments and
    their step count start anew. State: r indices and r scales, and no product with a basis at a step.

    References:
        Grass, arXiv 2406.17660, sections 3 and 4.

    Differs from the authors' code: none was released. Of the paper's rules `norm` is the default, since with `top` the
    same rows win for ever.
    """

    on_refresh: ClassVar[str] = "reset"
    without: ClassVar[tuple[str, ...]] = ("basis_format", "shard_basis", "products")

    rows: str = choice(
        "norm", "top", "norm_without", "uniform", "uniform_without", help="Grass: which rows of the gradient are taken"
    )

    @property
    @override
    def orthonormal(self) -> bool:  # type: ignore[override]
        return self.rows in ("top", "norm_without", "uniform_without")

    @override
    def slots(self) -> Slots:
        return {
            "row_index": Slot("r", "basis", dtype=torch.int64),
            "row_scale": Slot("r", "basis", encoding="fp32"),  # 0: never chosen
        }

    @override
    def refresh_(self, s: State, G: Tensor, ctx: Context) -> Tensor | None:
        r = s["row_index"].shape[-1]
        norms = kernels.column_squared_norms(G.mT).sqrt()  # (..., m)
        weights = torch.ones_like(norms) if self.rows.startswith("uniform") else norms
        if self.rows == "top":
            index = norms.topk(r, -1).indices
        elif self.rows.endswith("_without"):
            index = random.gumbel_top_r(weights, r, ctx.generator())
        else:
            index = random.draw(weights, r, ctx.generator())
        index = index.sort(-1).values
        q = (weights / weights.sum(-1, keepdim=True)).gather(-1, index)
        s["row_index"].copy_(index)
        s["row_scale"].copy_(torch.ones_like(q) if self.orthonormal else (r * q).rsqrt())
        return None

    @override
    def basis(self, s: State, ctx: Context) -> Basis:
        index, scale = s["row_index"], s["row_scale"]
        never = (scale == 0).all(-1, keepdim=True)  # a slice that has had no gradient yet takes the first rows
        first = torch.arange(index.shape[-1], device=index.device)
        return SelectedRows(torch.where(never, first, index), torch.where(never, 1.0, scale))
