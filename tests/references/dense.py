"""Rules of parameters without a subspace: SGD, and SCALE's normalised gradient and momentum (2506.16659)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from references.case import Entry


def unit_rms(X: Tensor, axis: int) -> Tensor:
    """SCALE Algorithm 1: every output divided by its RMS over the inputs, which lie along `axis`; zeros stay."""
    rms = (X * X).mean(axis, keepdim=True).sqrt()
    return X / rms.where(rms > 0, 1.0)


class Sgd:
    """W <- W - lr G."""

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        return R, 1.0

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        pass


class ColumnNorm(Sgd):
    """The columns of R are outputs, but of an embedding, whose outputs are rows."""

    def __init__(self, inputs: int = 0) -> None:
        self.inputs = inputs

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        return unit_rms(R, self.inputs), 1.0


class MomentumColumnNorm(ColumnNorm):
    """M <- b1 M + (1 - b1) R first, no bias correction (which would change nothing)."""

    M: Any = 0.0

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        self.M = h.beta1 * self.M + (1 - h.beta1) * R
        return super().update(self.M, h)


REFERENCES = {
    ("moments", "sgd"): Entry(fields=lambda case: {"moments": Sgd()}),
    ("moments", "column_norm"): Entry(fields=lambda case: {"moments": ColumnNorm()}),
    ("moments", "momentum_column_norm"): Entry(fields=lambda case: {"moments": MomentumColumnNorm()}),
}
