"""The effective rank of what weights changed by. Legend: W weight (rows, columns) · D difference of two."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.engine import collectives
from hf_lowrank.observe.first import COLUMNS
from hf_lowrank.tensors import random
from hf_lowrank.tensors.bases import Dense
from hf_lowrank.tensors.layout import local
from hf_lowrank.tensors.splits import Split, splits


class UpdateRank:
    """The effective rank (sum sigma^2)^2 / sum sigma^4 of what the weights have changed by since the last call.

    That is R_0 of Bartlett et al. (PNAS 2020, definition 3) of D D^T; sigma are the singular values of D. By default
    it is estimated from Y = D Omega, Omega (columns, 32) Gaussian: with K = Y^T Y, E K_ii = ||D||_F^2 and E K_ij^2 =
    ||D^T D||_F^2 for i != j. About 10 % off for one matrix, less for a mean; 128 bytes on the CPU per row of a weight,
    and one product of its size with 32 columns per checkpoint. The exact value keeps a copy of every matrix there.

    Args:
        exact: take D itself instead of the sketch.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self.exact = exact
        self.before: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, weights: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """Return the effective rank by name; nothing for a matrix that is new or did not change.

        Where weights are split over processes this is a collective operation: every process calls it.
        """
        result = {}
        for name, p in weights:
            now = self._sketch(p)
            before, self.before[name] = self.before.get(name), now
            if before is not None:
                K = self._gram(p, now.float() - before.float())
                value = effective_rank(K) if self.exact else estimated_rank(K, min(p.shape[-2:]))
                if torch.isfinite(value):
                    result[name] = float(value)
        return result

    def _sketch(self, p: Tensor) -> Tensor:
        """Return D or D Omega for the rows that this process holds, in which all columns count."""
        W, columns = local(p.detach()), _split(p, -1)
        if self.exact:
            return columns.gathered(W, W.dim() - 1).to("cpu", copy=True)
        Omega = _gaussian(p.shape[-1]).narrow(0, columns.start, columns.length).to(W.device)
        Y = Dense(Omega).project(W.mT).mT  # (..., rows, 32)
        if columns.team is not None:
            (Y,) = collectives.sum_together([Y.contiguous()], columns.team.group)
        return Y.cpu()

    def _gram(self, p: Tensor, D: Tensor) -> Tensor:
        """Return D^T D (..., k, k), or the smaller D D^T, summed over the processes that hold rows of the weight."""
        team = _split(p, -2).team
        smaller = self.exact and D.shape[-2] < D.shape[-1] and team is None
        K = D @ D.mT if smaller else D.mT @ D
        if team is not None:
            (K,) = collectives.sum_together([K.to(local(p).device)], team.group)
        return K


def _split(p: Tensor, axis: int) -> Split:
    """Return how an axis of a weight, counted from the last, is split over processes."""
    axis += p.dim()
    whole = Split(p.shape[axis])
    return splits(p).get(axis, whole) if isinstance(p, DTensor) else whole


@lru_cache
def _gaussian(columns: int) -> Tensor:
    """Return Omega (columns, 32), the same in every run."""
    drawing = random.generator(random.Stream.OBSERVER, columns)
    return torch.randn(columns, COLUMNS, generator=drawing, dtype=torch.float32)


def effective_rank(K: Tensor) -> Tensor:
    """Return tr(K)^2 / ||K||_F^2 of a Gram matrix (..., k, k), the mean over a batch that is not zero."""
    trace = K.diagonal(dim1=-2, dim2=-1).sum(-1)
    return _mean_of_positive(trace.square() / K.square().sum((-2, -1)), trace)


def estimated_rank(K: Tensor, largest: int) -> Tensor:
    """Estimate the effective rank of D from the Gram matrix (..., k, k) of D Omega; it lies in 1 .. `largest`."""
    k = K.shape[-1]
    diagonal = K.diagonal(dim1=-2, dim2=-1)
    off = (K.square().sum((-2, -1)) - diagonal.square().sum(-1)) / (k * (k - 1))  # ||D^T D||_F^2
    value = diagonal.mean(-1).square() / off - 2 / k  # E (tr K / k)^2 = ||D||_F^4 + 2 ||D^T D||_F^2 / k
    return _mean_of_positive(value.clamp(1, largest), diagonal.sum(-1))


def _mean_of_positive(values: Tensor, mass: Tensor) -> Tensor:
    return values[mass > 0].mean()
