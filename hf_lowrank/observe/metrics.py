"""What can be said of a run between its steps: overlaps with the first subspace, rank of the update, limiter, bytes.

Everything here reads the optimizer and changes nothing. Legend: P basis (..., m, r) · W weight (rows, columns) · D
difference of a weight between two checkpoints.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_lowrank.engine import collectives
from hf_lowrank.engine.plan import Plan, projected_bytes
from hf_lowrank.engine.refresh import UNKNOWN
from hf_lowrank.observe.records import module_type
from hf_lowrank.optimizer import Declared, LowRankOptimizer
from hf_lowrank.state.view import View, nbytes
from hf_lowrank.tensors import random
from hf_lowrank.tensors.bases import Dense
from hf_lowrank.tensors.layout import local


REPORT = ("overlap", "energy", "stable_rank")
"""The numbers that the engine leaves at every refresh of a matrix."""

COLUMNS = 32
"""Columns of a sketch."""


def matrices(optimizer: LowRankOptimizer) -> Iterator[tuple[str, Tensor, Mapping[str, Any], dict[str, Tensor]]]:
    """Yield (name of the module, weight, options, state) of every matrix that has had a refresh, in group order."""
    index = 0
    for group in optimizer.param_groups:
        names = group.get("param_names") or [""] * len(group["params"])
        for name, p in zip(names, group["params"], strict=True):
            s = optimizer.state.get(p, {})
            if "refreshes" in s and s["refreshes"] > 0:
                yield name.removesuffix(".weight") or f"parameter {index}", p, group, s
            index += 1


def reports(optimizer: LowRankOptimizer) -> list[tuple[str, int, Tensor]]:
    """Return (name, refreshes so far, last report) of every matrix that has had a refresh, in group order."""
    return [(name, int(s["refreshes"]), s["report"]) for name, _, _, s in matrices(optimizer)]


def known(names: Iterable[str], rows: list[Tensor]) -> list[dict[str, float]]:
    """Return vectors of numbers as dictionaries without what is unknown, in one transfer from the device."""
    values = torch.stack([row.float() for row in rows]).tolist() if rows else []
    return [{k: v for k, v in zip(names, row, strict=True) if v != UNKNOWN} for row in values]


def by_type(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean over the matrices of every module type, from values by name of the module."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, value in values.items():
        found[module_type(name)].append(value)
    return {kind: fmean(some) for kind, some in found.items()}


def residual_shares(optimizer: LowRankOptimizer) -> dict[str, float]:
    """Return the share of the last gradient outside the subspace, by name, where a method keeps it in its state."""
    found = [(name, local(s["residual_share"])) for name, _, _, s in matrices(optimizer) if "residual_share" in s]
    rows = known(("share",), [share.float().mean().reshape(1) for _, share in found])
    return {name: row["share"] for (name, _), row in zip(found, rows, strict=True)}


class FirstSubspaces:
    """The overlap ||P^T P_0||_F^2 / r of the present subspaces with the first ones.

    Kept of P_0 is S = P_0 Q (m, k) in bf16 on the CPU, Q (r, k) random with orthonormal columns, k = min(r, COLUMNS):
    64 m bytes a matrix. ||P^T S||_F^2 / k equals the overlap on average over Q, and up to rounding where r <= COLUMNS;
    else its standard deviation is below sqrt(2 / (k r)): 0.022 for r = 128, and less for a mean over matrices.
    """

    def __init__(self) -> None:
        self.sketches: dict[str, Tensor] = {}

    def overlap(self, name: str, basis: Tensor) -> float | None:
        """Return the overlap of a basis with the first one of its name; None if this is the first one."""
        if name not in self.sketches:
            self.sketches[name] = (basis @ _isometry(basis.shape[-1]).to(basis)).bfloat16().cpu()
            return None
        S = self.sketches[name].to(basis)  # (..., m, k)
        return float((basis.mT @ S).square().sum((-2, -1)).mean() / S.shape[-1])

    def save(self, file: Path) -> None:
        """Write the sketches, all or nothing."""
        part = file.with_suffix(".part")
        torch.save(self.sketches, part)
        part.replace(file)

    def load(self, file: Path) -> None:
        """Read what `save` wrote."""
        self.sketches = torch.load(file, weights_only=True)


@lru_cache
def _isometry(r: int) -> Tensor:
    """Return Q (r, k) with orthonormal columns, the same in every run."""
    if r <= COLUMNS:
        return torch.eye(r)
    draw = torch.randn(r, COLUMNS, generator=random.generator(random.Stream.OBSERVER, r))
    isometry: Tensor = torch.linalg.qr(draw)[0]
    return isometry


def stored_basis(plan: Plan, s: Mapping[str, Tensor]) -> Tensor | None:
    """Return this process's basis in fp32, decoded if need be; None where the method stores no (..., m, r) matrix."""
    buffer = plan.buffers.get("basis")
    if buffer is None or buffer.slot.axes != "m r":
        return None
    return View({name: local(tensor) for name, tensor in s.items()}, plan.buffers, plan.encodings)["basis"]


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

        Under FSDP2 this is a collective operation: every process calls it.
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
        W = local(p.detach())
        if self.exact:
            return W.to("cpu", copy=True)
        return Dense(_gaussian(W.shape[-1]).to(W.device)).project(W.mT).mT.cpu()  # (..., rows, 32)

    def _gram(self, p: Tensor, D: Tensor) -> Tensor:
        """Return D^T D (..., k, k), or the smaller D D^T, summed over the processes that hold rows of the weight."""
        rows_here = isinstance(p, DTensor) and p.dim() == 2
        smaller = self.exact and D.shape[-2] < D.shape[-1] and not rows_here
        K = D @ D.mT if smaller else D.mT @ D
        if isinstance(p, DTensor) and rows_here:
            (K,) = collectives.sum_together([K.to(local(p).device)], p.device_mesh.get_group())
        return K


@lru_cache
def _gaussian(columns: int) -> Tensor:
    """Return Omega (columns, 32), the same in every run."""
    return torch.randn(columns, COLUMNS, generator=random.generator(random.Stream.OBSERVER, columns))


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


class LimiterActivity:
    """How often the limiter of a norm's growth (Fira, APOLLO, GWT) was active, over matrices and steps.

    It does not wait for the device. Seen from the state alone: an active limiter leaves a norm that has grown by just
    its factor.
    """

    SLOTS = ("residual_norm", "norm")

    def __init__(self) -> None:
        self._last: Tensor | None = None
        self._counts: Tensor | None = None  # active, all

    def look(self, optimizer: LowRankOptimizer) -> None:
        """Compare the norms with those of the last call."""
        found = [
            (local(s[slot]), group["limiter"])
            for _, _, group, s in matrices(optimizer)
            for slot in self.SLOTS
            if slot in s and "limiter" in group
        ]
        if not found:
            return
        now = torch.cat([norm.reshape(-1).to(found[0][0].device) for norm, _ in found])
        last, self._last = self._last, now
        if last is None or last.shape != now.shape:
            return
        factor = torch.cat([torch.full((norm.numel(),), limiter) for norm, limiter in found]).to(now)
        seen = (last > 0) & (now > 0)
        active = seen & (now >= last * factor * (1 - 1e-6))  # fp32 rounds the product
        counts = torch.stack([active.sum(), seen.sum()])
        self._counts = counts if self._counts is None else self._counts.to(counts.device) + counts

    @property
    def counts(self) -> list[int]:
        """How many were active, and how many there were, since the last `share`; for a checkpoint."""
        return [0, 0] if self._counts is None else self._counts.tolist()

    def resume(self, counts: list[int]) -> None:
        """Go on from the counts of a checkpoint."""
        self._counts = torch.tensor(counts)

    def share(self) -> float | None:
        """Return the share of active ones since the last call, None if there was nothing to see."""
        (active, seen), self._counts = self.counts, None
        return active / seen if seen else None


def component_bytes(optimizer: LowRankOptimizer, model: nn.Module) -> dict[str, int]:
    """Return the bytes that this process holds of weights, gradients and state, and what AdamW's state would be.

    Gradients are those at the end of the backward pass; the layerwise mode holds the dense ones, the projected ones
    and the largest of the others. AdamW's two moments have the type of the weights, as torch keeps them.
    """
    trained = list(optimizer.declared())
    low_rank = [one for one in trained if one.config.low_rank]
    dense = [one for one in trained if not one.config.low_rank]

    def gradients(some: list[Declared]) -> int:
        return sum(local(one.weight).nbytes for one in some)

    def states(some: list[Declared]) -> int:
        return sum(nbytes(optimizer.state.get(one.weight, {})) or one.plan.nbytes for one in some)

    held = gradients(low_rank)
    if any(one.config.options["layerwise"] for one in low_rank):
        waiting = [one for one in low_rank if not one.config.parts.needs_gradient]
        held = sum(projected_bytes(one.plan, one.config) for one in waiting)
        held += max(local(one.weight).nbytes for one in low_rank)
    return {
        "weights": sum(local(p).nbytes for p in model.parameters()),
        "gradients": held + gradients(dense),
        "low_rank_state": states(low_rank),
        "dense_state": states(dense),
        "adamw_gradients": gradients(trained),
        "adamw_state": 2 * gradients(trained),
    }
