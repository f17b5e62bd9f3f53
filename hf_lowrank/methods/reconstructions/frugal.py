"""What the subspace leaves out, stepped by a rule that keeps nothing: FRUGAL.

Legend: E = G - P R residual (..., m, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import ColumnNorms, Context, Update
from hf_lowrank.methods.options import choice, number
from hf_lowrank.methods.parts import Reconstruction
from hf_lowrank.methods.reconstructions.compensation import outside
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import kernels


@dataclass(frozen=True)
class Frugal(Reconstruction, key="frugal"):
    """U = alpha P N + a_f sign(E), or with `free=column_norm` a_f E diag(d) with columns of unit RMS.

    sign(E) is formed for some columns at a time. At r = m nothing is left over, and a column whose residual is
    rounding noise gets none. Weights of low precision take both products of `column_norm` rounded to bf16, before they
    cancel: that is felt where a thousandth of the gradient or less is left over.

    State: none.

    References:
        FRUGAL, arXiv 2411.07837, Algorithm 1 (SignSGD for what has no state; its learning rate there is that of the
        subspace, a tenth of it in fine-tuning). Columns of unit RMS: SCALE, arXiv 2506.16659.

    Differs from the authors' code: that was not read. There blocks of whole layers or columns are chosen by default;
    here the subspace is what `subspace` says.
    """

    needs_orthonormal: ClassVar[bool] = True
    scales_residual: ClassVar[bool] = True
    needs_gradient: ClassVar[bool] = True

    free: str = choice("sign", "column_norm", help="FRUGAL: the rule for what the subspace leaves out")
    free_scale: float = number(1.0, help="FRUGAL: a_f, factor of that step")

    @property
    @override
    def by_columns(self) -> bool:  # type: ignore[override]
        return self.free == "column_norm"

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Update:
        if ctx.r == ctx.m:  # no residual
            return Update(N, ctx.scale)
        c = outside(norms, R)  # (..., n)
        factor = self.free_scale / c_t  # the engine multiplies all by Adam's bias correction
        if self.free == "sign":
            whole, sizes = norms.basis.spread(R, (c > 0).to(R.dtype).mul_(factor))
            assert whole is not None and sizes is not None

            def signs(G: Tensor, start: int, length: int) -> Tensor:
                E = G.clone()
                norms.basis.add_(E, whole.narrow(-1, start, length), beta=1.0, alpha=-1.0)
                return E.sign_().mul_(kernels.piece(sizes, start, length).unsqueeze(-2))

            return Update(N, ctx.scale, rest=signs)
        d = kernels.divisor(c).rsqrt_().mul_(factor * sqrt(ctx.m))
        return Update(torch.addcmul(N, R, d.unsqueeze(-2), value=-1 / ctx.scale), ctx.scale, d)
