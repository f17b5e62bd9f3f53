"""The first subspace of every matrix, kept as a sketch. Legend: P basis (..., m, r) · P_0 the first one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.engine.plan import Plan
from hf_lowrank.observe.metrics import Matrix
from hf_lowrank.observe.records import FIRST_FILE
from hf_lowrank.optimizer import LowRankOptimizer
from hf_lowrank.state.view import View
from hf_lowrank.tensors import random
from hf_lowrank.tensors.layout import local


COLUMNS = 32
"""Columns of a sketch."""


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
        return torch.eye(r, dtype=torch.float32)
    draw = torch.randn(r, COLUMNS, generator=random.generator(random.Stream.OBSERVER, r), dtype=torch.float32)
    isometry: Tensor = torch.linalg.qr(draw)[0]
    return isometry


def stored_basis(plan: Plan, s: Mapping[str, Tensor]) -> Tensor | None:
    """Return a basis in fp32, decoded if need be; None where the process keeps no (..., m, r) matrix, or a piece."""
    buffer = plan.buffers.get("basis")
    if buffer is None or buffer.slot.axes != "m r" or "basis" in plan.pieces:
        return None
    return View({name: local(tensor) for name, tensor in s.items()}, plan.buffers, plan.encodings)["basis"]


class Firsts:
    """How far every subspace has moved from its first one.

    Args:
        optimizer: the optimizer.
        folder: where the sketches of the first subspaces are kept.
        saved: what a checkpoint has of `kept`.
        read: whether this process measures, so that it needs the sketches.
    """

    def __init__(self, optimizer: LowRankOptimizer, folder: Path, saved: Mapping[str, Any], *, read: bool) -> None:
        self.optimizer, self.folder = optimizer, folder
        self.kept_in = Path(saved.get("folder", folder))
        self.sketches = FirstSubspaces()
        self.grown = False  # whether there is one that is not written
        self.overlaps: dict[str, float] = dict(saved.get("firsts", {})) if read else {}
        files = (place / FIRST_FILE for place in (folder, self.kept_in)) if saved and read else ()
        if file := next((file for file in files if file.exists()), None):
            self.sketches.load(file)

    def measure(self, matrix: Matrix) -> float | None:
        """Return the overlap with the first subspace; None for the first one itself, or where that was not seen."""
        if matrix.refreshes > 1 and matrix.name not in self.sketches.sketches:
            return None
        basis = stored_basis(self.optimizer.plan(matrix.weight), matrix.state)
        if basis is None:
            return None
        if matrix.refreshes <= 1:  # a sketch that is there is of steps which are made anew
            self.sketches.sketches.pop(matrix.name, None)
        overlap = self.sketches.overlap(matrix.name, basis)
        if overlap is None:
            self.grown = True
        else:
            self.overlaps[matrix.name] = overlap
        return overlap

    def save(self) -> None:
        """Write the sketches."""
        self.kept_in, self.grown = self.folder, False
        self.sketches.save(self.folder / FIRST_FILE)

    def kept(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"firsts": dict(self.overlaps), "folder": str(self.kept_in.resolve())}
