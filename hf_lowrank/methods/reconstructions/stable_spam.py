"""Spikes taken out of a gradient before anything looks at it: the option stable_spam."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Carried, ColumnNorms, Context, Update
from hf_lowrank.methods.parts import Reconstruction
from hf_lowrank.methods.registry import Gauge
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors.bases import Basis
from hf_lowrank.tensors.sums import Asking, Max, Rule, Sum


MAX_DECAY, MEAN_DECAY, SQUARE_DECAY = 0.999, 0.7, 0.9
"""Decays of the running means of max |G|, ||G|| and ||G||^2: gamma_3, gamma_1 and gamma_2 of the paper."""


@dataclass(frozen=True)
class StableSpam(Reconstruction):
    """Any reconstruction, on a gradient without spikes: G' in the place of G.

    Entries above theta, the running mean of max |G|, are multiplied by theta / max |G|; the result is brought to the
    norm m / sqrt(v), m and v the running means of its norm and of the square. All three are corrected for their
    start at zero. G' is a matrix of the weight's size, held until it is projected.

    State: 3 numbers, beside those of what it wraps.

    References:
        Stable-SPAM, arXiv 2502.17055, Algorithm 1 (AdaClip and AdaGN).

    Attributes:
        inner: what makes the step.

    Differs from the authors' code: its reset of the momentum is not part of this. Only matrices that are projected, or
    stepped whole by a row `full_...`, are treated; each matrix of a stack has its own three numbers.
    """

    needs_gradient: ClassVar[bool] = True  # layerwise would treat every micro-batch apart
    replaces_gradient: ClassVar[bool] = True

    inner: Reconstruction

    @property
    @override
    def needs_momentum(self) -> bool:  # type: ignore[override]
        return self.inner.needs_momentum

    @property
    @override
    def needs_orthonormal(self) -> bool:  # type: ignore[override]
        return self.inner.needs_orthonormal

    @property
    @override
    def scales_residual(self) -> bool:  # type: ignore[override]
        return self.inner.scales_residual

    @property
    @override
    def gauges(self) -> Mapping[str, Gauge]:  # type: ignore[override]
        return self.inner.gauges

    @override
    def rate(self, scale: float) -> float:
        return self.inner.rate(scale)

    @override
    def slots(self) -> Slots:
        return {**self.inner.slots(), **{name: Slot("", values="exact") for name in ("spike", "norm_mean", "norm_sq")}}

    @override
    def absorb(self, s: State, G: Tensor, ctx: Context) -> Asking[tuple[Tensor, dict[str, Tensor]]]:
        X, t = G.float(), ctx.age + (0 if ctx.written else 1)
        new = 0.0 if ctx.written else 1.0  # this gradient is in the means already
        size = X.abs()
        largest = yield from _over_all(Max, size.amax((-2, -1)) if size.numel() else size.sum((-2, -1)))
        spike = torch.lerp(s["spike"], largest, new * (1 - MAX_DECAY))
        theta = spike / (1 - MAX_DECAY**t)
        share = (theta / largest.clamp_min(torch.finfo(X.dtype).tiny))[..., None, None]
        X = torch.where(size > theta[..., None, None], X * share, X)
        squares = yield from _over_all(Sum, X.square().sum((-2, -1)))
        norm = squares.sqrt()
        mean = torch.lerp(s["norm_mean"], norm, new * (1 - MEAN_DECAY))
        square = torch.lerp(s["norm_sq"], squares, new * (1 - SQUARE_DECAY))
        root = (square / (1 - SQUARE_DECAY**t)).sqrt() + 1e-8
        wanted = mean / (1 - MEAN_DECAY**t) / root
        lost = torch.finfo(X.dtype).tiny / torch.finfo(X.dtype).eps  # squares that underflow: such a gradient stays
        X = X * torch.where(squares > lost, wanted / norm, 1.0)[..., None, None]
        rule = self.inner.absorb(s, X, ctx)
        X, fresh = (yield from rule) if isinstance(rule, Generator) else rule
        return X, {"spike": spike, "norm_mean": mean, "norm_sq": square, **fresh}

    @override
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Rule[Update]:
        return self.inner.combine(s, norms, R, N, c_t, ctx)

    @override
    def change_basis_(self, s: State, G: Tensor, old: Carried, new: Carried, ctx: Context) -> None:
        self.inner.change_basis_(s, G, old, new, ctx)

    @override
    def after_step_(self, s: State, G: Tensor, R: Tensor, basis: Basis) -> None:
        self.inner.after_step_(s, G, R, basis)


def _over_all(kind: type[Sum] | type[Max], partial: Tensor) -> Asking[Tensor]:
    """Ask for what is over the whole matrix, whichever of its axes is split."""
    columns = yield kind(partial, over="columns")
    rows = yield kind(columns, over="rows")
    return rows
