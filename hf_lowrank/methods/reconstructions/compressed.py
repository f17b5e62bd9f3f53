"""What compression by blocks leaves out, put back without a state: GWT's details, FOAM's residual.

Legend: G_b the gradient on one block of adjacent entries (rows of the wide view) · N, M, V one number per block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import ColumnNorms, Context, Update
from hf_lowrank.methods.limiter import LIMITED, LIMITER, limit_
from hf_lowrank.methods.moments.adam import eps_of_root
from hf_lowrank.methods.options import again, number
from hf_lowrank.methods.parts import Reconstruction
from hf_lowrank.methods.registry import Gauge
from hf_lowrank.methods.subspaces.blocks import block_size
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.row_blocks import Blocks
from hf_lowrank.tensors.sums import Asking, Sum


@dataclass(frozen=True)
class Details(Reconstruction, key="details"):
    """U = alpha (P N + (G - P R) / D) / L: the details take the denominator D of their block and no momentum.

    The inverse transform of detail coefficients that share one factor per block is that factor on G - P R, so no
    transform is ever computed. L limits the growth of ||N||.

    State: one norm.

    References:
        GWT, arXiv 2501.07237, Algorithm 1.

    Differs from the authors' code: the inverse transform is not computed, and eps is added to the corrected sqrt(V)
    unless `eps_place=released`.

    As printed nothing bounds the details: where a block's mean is next to nothing so is D, above all in the first
    steps. Warm up.
    """

    needs_gradient: ClassVar[bool] = True
    composable: ClassVar[bool] = False
    gauges: ClassVar[Mapping[str, Gauge]] = LIMITED

    limiter: float = again(LIMITER)

    @override
    def slots(self) -> Slots:
        """The limited norm of the last direction, 0 while unset."""
        return {"norm": Slot("", values="exact")}

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Asking[Update]:
        D = s["exp_avg_sq"].sqrt().add_(eps_of_root(ctx))  # (..., r, n)
        squared = yield Sum(N.square().sum((-2, -1)), over="columns")
        factor = (ctx.scale / limit_(s, "norm", squared.sqrt(), self.limiter, 1e-8))[..., None, None]
        size = block_size(ctx.rank)
        blocks = Blocks(ctx.m, size, size**-0.5)
        Z = (N - R / D) * factor

        def details(G: Tensor, start: int, length: int) -> Tensor:
            columns = slice(start, start + length)
            return G / blocks.repeat(D[..., columns] / factor)

        return Update(Z, rest=details)


@dataclass(frozen=True)
class Unfold(Reconstruction, key="unfold"):
    """U = alpha m / (sqrt(v) + eps), m = unfold(M) + c E, v = unfold(V) + c^2 E∘E, E = G - unfold(fold(G)).

    References:
        FOAM, arXiv 2512.07112; the rule: its code.

    Differs from the authors' code: eps is added to the corrected sqrt(v) unless `eps_place=released`, and nothing of
    the weight's size is kept between operations: the step is formed for some columns at a time.
    """

    needs_gradient: ClassVar[bool] = True
    composable: ClassVar[bool] = False

    residual_scale: float = number(1.0, help="FOAM: c, weight of what folding leaves out")

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Update:
        M, V = N.chunk(2, -2)
        folded = R.narrow(-2, 0, M.shape[-2])
        blocks = Blocks(ctx.m, block_size(ctx.rank), 1.0)
        eps = eps_of_root(ctx)

        def step(G: Tensor, start: int, length: int) -> Tensor:
            m, v, g = (blocks.repeat(X.narrow(-1, start, length)) for X in (M, V, folded))
            E = (G - g).mul_(self.residual_scale)
            return m.add_(E).div_(v.addcmul_(E, E).sqrt_().add_(eps)).mul_(ctx.scale)

        return Update(rest=step)
