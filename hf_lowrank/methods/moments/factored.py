"""A second moment kept as one number per row and one per column: Adafactor, AdaLomo, CAME.

Legend: R projected gradient (..., r, n) · row (..., r) and col (..., n) running means of R∘R · M first moment.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.moments.momentum import Momentum
from hf_lowrank.methods.options import again, choice, number
from hf_lowrank.methods.parts import Moments
from hf_lowrank.methods.registry import CARRIED
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.layout import local
from hf_lowrank.tensors.sums import Asking, Sum


DECAY_RATE = number(0.8, help="Adafactor, AdaLomo, FLora: the second moment's decay is 1 - t^-decay_rate")
CLIP_THRESHOLD = number(1.0, above=0.0, help="Adafactor, AdaLomo, CAME, FLora: largest RMS of an update")

TINY = 1e-30
"""Added to squared gradients, so that a row of zeros can be divided by."""


def factors(columns: Columns, prefix: str) -> Slots:
    """Declare the statistics of a matrix, or of a vector (which are not factored)."""
    if columns.vector:
        return {prefix: Slot("n", values="exact")}
    return {f"{prefix}_row": Slot("r", values="exact"), f"{prefix}_col": Slot("n", values="exact")}


def observe(s: State, square: Tensor, prefix: str, beta: float, columns: Columns) -> Asking[Tensor]:
    """Take squares into the statistics, in place, and return 1 / sqrt(V^) of the mean square V^ they stand for.

    That of a matrix is V^_ij = row_i col_j / mean(row) (Adafactor, section 3).
    """
    if square.dim() < 2:
        return s[prefix].lerp_(square, 1 - beta).rsqrt()
    row, col = s[f"{prefix}_row"], s[f"{prefix}_col"]
    total = yield Sum(square.sum(-1), over="columns")
    row.lerp_(total / columns.n, 1 - beta)
    col.lerp_(square.mean(-2), 1 - beta)
    return inverse_root(row, row.mean(-1, keepdim=True), col)


def inverse_root(row: Tensor, mean: Tensor, col: Tensor) -> Tensor:
    """Return 1 / sqrt(row_i col_j / mean), as a product of roots, since the product of statistics may underflow."""
    left = (row / mean).clamp_min_(TINY).rsqrt_()
    return left.unsqueeze(-1) * col.rsqrt().unsqueeze(-2)


def clipped(u: Tensor, threshold: float, columns: Columns) -> Asking[Tensor]:
    """Return u / max(1, RMS(u) / threshold), in place."""
    axes = (-2, -1) if u.dim() > 1 else (-1,)
    rows = u.shape[-2] if u.dim() > 1 else 1
    total = yield Sum(u.square().sum(axes), over="columns")
    rms = (total / (rows * columns.n)).sqrt()
    return u.div_((rms / threshold).clamp_min_(1.0).view(rms.shape + (1,) * len(axes)))


def rotate_factors_(s: State, C: Tensor, *prefixes: str) -> None:
    """Carry M and the row statistics: M <- C M, row_i <- sum_j C_ij^2 row_j; columns stay."""
    s["exp_avg"].copy_(C @ s["exp_avg"])
    rotate_rows_(s, C, *prefixes)


def rotate_rows_(s: State, C: Tensor, *prefixes: str) -> None:
    """Carry the row statistics: row_i <- sum_j C_ij^2 row_j; columns stay."""
    for prefix in prefixes:
        row = s[f"{prefix}_row"]
        row.copy_((C.square() @ row.unsqueeze(-1)).squeeze(-1))


def normalised(s: State, R: Tensor, decay_rate: float, ctx: Context) -> Asking[Tensor]:
    """Take R into Adafactor's statistics and return U (a new tensor)."""
    beta2 = 1 - ctx.moment_step**-decay_rate
    root = yield from observe(s, R.square() + TINY, "square", beta2, ctx.columns)
    return R * root


@dataclass(frozen=True)
class Adafactor(Moments, key="adafactor"):
    """U = R / sqrt(V^) with V^ = row col^T / mean(row) and b2_t = 1 - t^-decay_rate; U <- U / max(1, RMS(U) / clip);
    M <- b1 M + (1 - b1) U;  N = M. With `clip_at=step` it is N that is limited, and not U.

    State on R: rn + r + n. The update has the size of a sign, so the learning rate is of Adam's order.

    References:
        Adafactor, arXiv 1804.04235, Algorithms 4 and 5, with first moment; on a projected gradient: GaLore, arXiv
        2403.03507, section 5, and I3S, arXiv 2502.05790, Table 1.

    Differs from the authors' code: GaLore's multiplies by the learning rate before the momentum, so that a schedule
    lags by 1 / (1 - b1) steps; here it comes last. There is no relative step and no parameter scaling.
    """

    of_gradients: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = CARRIED
    without: ClassVar[tuple[str, ...]] = ("eps_place",)

    decay_rate: float = again(DECAY_RATE)
    clip_threshold: float = again(CLIP_THRESHOLD)
    clip_at: str = choice(
        "update", "step", help="Adafactor: limit an update before it enters the momentum, or the step after it"
    )

    @override
    def slots(self, columns: Columns) -> Slots:
        return {"exp_avg": Slot("r n"), **factors(columns, "square")}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        u = yield from normalised(s, R, self.decay_rate, ctx)
        if self.clip_at == "update":
            u = yield from clipped(u, self.clip_threshold, ctx.columns)
        M = s["exp_avg"].lerp_(u, 1 - ctx.beta1)
        return M if self.clip_at == "update" else (yield from clipped(M.clone(), self.clip_threshold, ctx.columns))

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        rotate_factors_(s, C, "square")


@dataclass(frozen=True)
class AdaLomo(Moments, key="adalomo"):
    """Adafactor's clipped U without a first moment, in units of the weight: N = max(eps2, RMS(W)) U.

    State on R: r + n.

    References:
        AdaLomo, arXiv 2310.10195, Algorithm 1.

    Differs from the authors' code: decay is the group's, decoupled, and not in units of the weight; the state is saved
    and loaded, and needs no CUDA (transformers' `adalomo` keeps it in attributes and on a GPU).
    """

    needs_weight: ClassVar[bool] = True
    keeps_momentum: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = CARRIED
    without: ClassVar[tuple[str, ...]] = ("eps_place",)

    decay_rate: float = again(DECAY_RATE)
    clip_threshold: float = again(CLIP_THRESHOLD)
    smallest_weight: float = number(1e-3, above=0.0, help="AdaLomo: least RMS that a weight counts as having")

    @override
    def slots(self, columns: Columns) -> Slots:
        return factors(columns, "square")

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        W = local(ctx.weight)
        axes = (-2, -1) if ctx.m else tuple(range(W.dim()))  # of every matrix of a stack; a dense parameter is one
        norm = torch.linalg.vector_norm(W, dim=axes, dtype=torch.float32)
        total = yield Sum(norm.square(), over="columns")
        size = (total / prod(ctx.weight.shape[axis] for axis in axes)).sqrt().clamp_min_(self.smallest_weight)
        u = yield from normalised(s, R, self.decay_rate, ctx)
        u = yield from clipped(u, self.clip_threshold, ctx.columns)
        return u.mul_(size.view(size.shape + (1,) * (u.dim() - size.dim())))

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        rotate_rows_(s, C, "square")


@dataclass(frozen=True)
class CAME(Moments, key="came"):
    """Adafactor's U with b2 from the group; M <- b1 M + (1 - b1) U; the running mean of (U - M)^2 + eps2, factored as
    well, says how much M is to be trusted: N = M / sqrt(S^).

    State on R: rn + 2 (r + n). Vectors have no confidence: N = M.

    References:
        CAME, arXiv 2307.02047, Algorithm 2.

    Differs from the authors' code: the factors are those of the projected gradient. beta1 = 0, which leaves nothing to
    measure, is refused. As there nothing bounds the first steps, when the confidence is that of next to nothing: they
    may be tens of times the learning rate.
    """

    of_gradients: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = CARRIED
    without: ClassVar[tuple[str, ...]] = ("eps_place",)

    clip_threshold: float = again(CLIP_THRESHOLD)
    beta3: float = number(0.9999, below=1.0, help="CAME: decay of the confidence")
    eps2: float = number(1e-16, above=0.0, help="CAME: added to the squared instability")

    @override
    def slots(self, columns: Columns) -> Slots:
        confidence = factors(columns, "instability") if not columns.vector else {}
        return {"exp_avg": Slot("r n"), **factors(columns, "square"), **confidence}

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Asking[Tensor]:
        """

        Raises:
            ValueError: without momentum, from which the instability is measured.
        """
        if ctx.beta1 == 0:
            raise ValueError("CAME measures an update against its momentum: set beta1 (adam_beta1) above 0")
        root = yield from observe(s, R.square() + TINY, "square", ctx.beta2, ctx.columns)
        u = yield from clipped(R * root, self.clip_threshold, ctx.columns)
        M = s["exp_avg"].lerp_(u, 1 - ctx.beta1)
        if R.dim() < 2:
            return M
        instability = (u - M).square_().add_(self.eps2)
        root = yield from observe(s, instability, "instability", self.beta3, ctx.columns)
        return M * root

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        rotate_factors_(s, C, "square", "instability")


@dataclass(frozen=True)
class SketchedMomentum(Moments, key="sketched_momentum"):
    """M <- b1 M + (1 - b1) R, the momentum of what FLora sketches.

    What is not sketched is stepped by Adafactor with momentum, the step limited after it.

    References:
        FLora, arXiv 2402.03293, Algorithm 2; the rule of what is not sketched: its code.

    Differs from the authors' code: there is momentum by default, Trainer's adam_beta1. Gradients are not compressed
    while they accumulate: Trainer owns them.
    """

    composable: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = Momentum.transports
    without: ClassVar[tuple[str, ...]] = ("eps_place",)

    decay_rate: float = again(DECAY_RATE)
    clip_threshold: float = again(CLIP_THRESHOLD)

    @property
    @override
    def dense(self) -> Moments:
        return Adafactor(self.decay_rate, self.clip_threshold, clip_at="step")

    @override
    def slots(self, columns: Columns) -> Slots:
        return Momentum().slots(columns)

    @override
    def update(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        return Momentum().update(s, R, ctx)

    @override
    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        Momentum().rotate_(s, C, how, ctx)
