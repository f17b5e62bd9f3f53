"""One moment, orthogonalised: Muon, of the whole gradient or in a subspace.

Legend: R projected gradient (..., r, n) · M first moment (..., r, n) · X what is orthogonalised, M or b1 M + (1 - b1)
R · K = X X^T (..., r, r), a sum over the columns · N direction (..., r, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.moments.adam import Adam
from hf_lowrank.methods.options import again, choice, flag, integer, number
from hf_lowrank.methods.parts import Moments
from hf_lowrank.methods.registry import CARRIED
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.random import float64
from hf_lowrank.tensors.sums import Asking, Sum, whole_columns


ADAMS_RMS = 0.2
"""RMS of an update of Adam's, to which that of a whole matrix with orthonormal rows is brought."""

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),)
"""Coefficients (a, b, c) of X <- a X + b K X + c K^2 X, in every iteration: as in torch.optim.Muon."""

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
"""The same, best for each iteration in turn; the last is repeated (Polar Express, arXiv 2505.16932)."""

SMALLEST = sqrt(torch.finfo(torch.float32).tiny)
"""Norm under which squares are lost in fp32: what has faded below it is divided by it, and stays small."""

ORTHOGONALIZE: Any = choice(
    "exact",
    "newton_schulz",
    "polar_express",
    help="Muon: exact: from the Gram matrix in float64; newton_schulz: Muon's iteration in bf16, as torch.optim.Muon, "
    "singular values in 0.7 .. 1.2; polar_express: the best polynomials of the same degree, in fp32",
)
STEPS: Any = integer(5, minimum=1, help="Muon: iterations of newton_schulz and polar_express")
MOMENTUM: Any = number(
    None, below=1.0, help="Muon, RMNP: b1 of the matrices; default: the first of betas, which all else has in any case"
)
NESTEROV: Any = flag(False, help="Muon: orthogonalise b1 M + (1 - b1) R instead of M")
ROW_SCALES: Any = flag(
    False, help="Muon: keep the rows of M in units of their size, which codes of few bits hold better"
)
ADJUST_LR: Any = choice(
    "match_rms_adamw",
    "original",
    help="Muon: factor of the orthogonalised matrix: 0.2 sqrt(max(m, n)), the size of Adam's step, or sqrt(max(1, "
    "outputs / inputs))",
)


@dataclass(frozen=True)
class OneMoment(Moments):
    """M <- b1 M + (1 - b1) R, and a rule that brings it to one size; dense parameters take Adam."""

    momentum: float | None = again(MOMENTUM)
    nesterov: bool = again(NESTEROV)

    transports: ClassVar[tuple[str, ...]] = CARRIED

    @property
    @override
    def dense(self) -> Moments:
        return Adam()

    @override
    def slots(self, columns: Columns) -> Slots:
        return {"exp_avg": Slot("r n")}

    @override
    def beta1(self, usual: float) -> float:
        return usual if self.momentum is None else self.momentum

    def taken(self, M: Tensor, R: Tensor, ctx: Context) -> Tensor:
        """Take R into M, in place, and return M, or with `nesterov` b1 M + (1 - b1) R."""
        M.lerp_(R, 1 - ctx.beta1)
        return torch.lerp(R, M, ctx.beta1) if self.nesterov else M

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        s["exp_avg"].copy_(C @ s["exp_avg"])


@dataclass(frozen=True)
class Orthogonalised(OneMoment):
    """A rule that takes the polar factor of the momentum further."""

    orthogonalize: str = again(ORTHOGONALIZE)
    ns_steps: int = again(STEPS)
    row_scales: bool = again(ROW_SCALES)

    @override
    def slots(self, columns: Columns) -> Slots:
        return {**super().slots(columns), **({"row_scale": Slot("r", values="exact")} if self.row_scales else {})}

    def orthogonal(self, s: State, R: Tensor, ctx: Context, factor: float = 1.0) -> Asking[Tensor]:
        """Take R into M and return `factor` times the polar factor, for this process's columns (a new tensor)."""
        M = s["exp_avg"]
        if self.row_scales:
            M.mul_(s["row_scale"].unsqueeze(-1))
        X = self.taken(M, R, ctx)
        polar = yield from orthogonal(X, self.orthogonalize, self.ns_steps, ctx.columns, factor)
        if self.row_scales:
            yield from self._scale_rows_(s, ctx)
        return polar

    def _scale_rows_(self, s: State, ctx: Context) -> Asking[None]:
        """Bring the rows of M to unit RMS, and keep what they had."""
        squares = yield Sum(s["exp_avg"].square().sum(-1), over="columns")
        scale = s["row_scale"].copy_((squares / ctx.columns.n).sqrt_())
        s["exp_avg"].div_(torch.where(scale > 0, scale, 1.0).unsqueeze(-1))

    @override
    def first_moment(self, s: State, ctx: Context) -> Tensor:
        return s["exp_avg"] * s["row_scale"].unsqueeze(-1) if self.row_scales else s["exp_avg"]

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        if self.row_scales:  # of the rows before; the next step scales those of now
            s["exp_avg"].mul_(s["row_scale"].unsqueeze(-1))
            s["row_scale"].fill_(1.0)
        super().rotate_(s, C, how, ctx)


@dataclass(frozen=True)
class Muon(Orthogonalised, key="muon"):
    """M <- b1 M + (1 - b1) R;  N = 0.2 sqrt(max(m, n)) U V^T for M = U S V^T, no bias correction.

    With `nesterov` the polar factor is that of b1 M + (1 - b1) R. The exact one is K^-1/2 X with K = X X^T, in
    float64: of a condition of 1e4 K has the square. Directions of rounding noise (`inverse_root`) give nothing, so
    that zeros give zeros. The iterations need all columns in one place: where FSDP2 splits them every process gets
    them all.

    State: rn. Dense parameters take Adam. Every step costs one eigendecomposition of an r x r matrix, or `ns_steps`
    times three products.

    References:
        In a subspace: SUMO, arXiv 2505.24749, Algorithm 1, of which the row `sumo` has all but the limiter: M is
        carried along (`on_refresh=rotate`) and what the subspace leaves out is stepped along. Of the whole gradient:
        Muon (Jordan et al., 2024) as in torch.optim.Muon; the factor 0.2 sqrt(max(m, n)): Muon is Scalable for LLM
        Training, arXiv 2502.16982.

    Differs from the authors' code: the momentum of torch.optim.Muon is 0.95, here it is the first of betas, 0.9 where
    nothing is said (`momentum`). SUMO's code was not read; from its paper, in that the polar factor comes from K
    instead of a singular value decomposition of M, which needs all columns in one place; its limiter of the update's
    growth is left out, since the size of N does not depend on the gradient's. torch.optim.Muon takes matrices only;
    here all else takes Adam. It divides by a norm of at least 1e-7, so that smaller momenta make smaller steps; here
    their steps have full size.
    """

    adjust_lr: str = again(ADJUST_LR)

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        polar = yield from self.orthogonal(s, R, ctx, adjusted(self.adjust_lr, ctx))
        return polar


def adjusted(how: str, ctx: Context) -> float:
    """Return the factor of an orthogonalised matrix; see ADJUST_LR."""
    if how == "match_rms_adamw":
        return ADAMS_RMS * sqrt(max(ctx.m, ctx.columns.n))
    outputs, inputs = (ctx.columns.n, ctx.m) if ctx.columns.block else (ctx.m, ctx.columns.n)
    return sqrt(max(1.0, outputs / inputs))


def orthogonal(X: Tensor, how: str, steps: int, columns: Columns, factor: float = 1.0) -> Asking[Tensor]:
    """Return `factor` times the polar factor U V^T of X = U S V^T (..., r, n), for this process's columns.

    Args:
        X: the columns that this process holds, in fp32.
        how: see ORTHOGONALIZE.
        steps: of an iteration.
        columns: where X lies.
        factor: what the result is multiplied by.
    """
    n, tall = columns.n, X.shape[-2] >= columns.n
    if how == "exact" and not tall:  # a sum over the columns is enough
        wide = float64(X)
        K = yield Sum(wide @ wide.mT, over="columns")
        del wide  # of all matrices that wait for their sums
        return ((inverse_root(K, n, torch.finfo(X.dtype).eps) * factor) @ float64(X)).to(X)
    whole = yield from whole_columns(X, columns.start, n)
    short = whole.mT if tall else whole  # a square one as torch.optim.Muon sees it: (outputs, inputs)
    if how == "exact":
        wide = float64(short)
        found = (inverse_root(wide @ wide.mT, max(short.shape[-2:]), torch.finfo(X.dtype).eps) @ wide).to(X)
    elif how == "newton_schulz":
        found = iterated(short.bfloat16(), NEWTON_SCHULZ, steps)
    else:
        found = iterated(short, POLAR_EXPRESS, steps, margin=1.01)
    held = (found.mT if tall else found).narrow(-1, columns.start, X.shape[-1])
    return held.to(X.dtype).mul_(factor)


def iterated(
    X: Tensor, coefficients: Sequence[tuple[float, float, float]], steps: int, *, margin: float = 1.0
) -> Tensor:
    """Return X (..., r, n), short side first, after iterations that bring its singular values towards 1.

    Args:
        X: the matrix, of any norm.
        coefficients: (a, b, c) of each iteration; the last are repeated.
        steps: how many.
        margin: by how much the norm is to be below 1, as a factor: rounding must not bring a singular value above.
    """
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    X = X / norm.mul_(margin).clamp_min_(SMALLEST)
    plus_product = torch.addmm if X.dim() == 2 else torch.baddbmm
    for i in range(steps):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        K = X @ X.mT
        X = plus_product(X, plus_product(K, K, K, beta=b, alpha=c), X, beta=a)
    return X


def inverse_root(K: Tensor, n: int, eps: float) -> Tensor:
    """Return K^-1/2 on the directions that are known, and zero on the others.

    X is known to eps of its entries. Independent errors of size e make a matrix of norm e (sqrt(r) + sqrt(n)) at most,
    and no entry is larger than the largest singular value: one below eps (sqrt(r) + sqrt(n)) times that is noise.

    Args:
        K: (..., r, r) float64 Gram matrix of X (..., r, n).
        n: columns of X, on all processes.
        eps: relative precision of the entries of X.
    """
    values, Q = torch.linalg.eigh(K)  # ascending
    noise = eps * (sqrt(K.shape[-1]) + sqrt(n))
    known = values > noise**2 * values[..., -1:].clamp_min(0)
    roots = torch.where(known, values, 1.0).rsqrt() * known
    root: Tensor = (Q * roots.unsqueeze(-2)) @ Q.mT
    return root
