"""What can be said of every matrix between two steps: of its last refresh, and the gauges of its method.

Everything here reads the optimizer and changes nothing. No method and no gauge is known by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowrank.engine.known import names_of
from hf_lowrank.engine.refresh import UNKNOWN
from hf_lowrank.observe.records import module_type
from hf_lowrank.optimizer import LowRankOptimizer
from hf_lowrank.tensors.layout import local


REPORT = ("overlap", "energy", "stable_rank")
"""The numbers that the engine leaves at every refresh of a matrix."""


class Matrix(NamedTuple):
    """One matrix that has had a refresh.

    Attributes:
        name: of its module.
        weight: the parameter.
        state: its state.
    """

    name: str
    weight: Tensor
    state: dict[str, Tensor]

    @property
    def refreshes(self) -> int:
        """How many refreshes it has had."""
        return refreshes(self.state)

    @property
    def steps(self) -> int:
        """How many steps it has had."""
        return int(self.state["step"])


def refreshes(state: Mapping[str, Tensor]) -> int:
    """Return how many refreshes a parameter has had, those before its state was last dropped too."""
    return sum(int(state.get(counter, 0)) for counter in ("refreshes", "earlier"))


def matrices(optimizer: LowRankOptimizer) -> Iterator[Matrix]:
    """Yield every matrix that has a basis, in group order."""
    index = 0
    for group in optimizer.param_groups:
        for name, p in zip(names_of(group), group["params"], strict=True):
            s = optimizer.state.get(p, {})
            if "refreshes" in s and s["refreshes"] > 0:
                yield Matrix(name.removesuffix(".weight") or f"parameter {index}", p, s)
            index += 1


class Gauges:
    """The gauges that the parts of an optimizer declare: what to read, and what to count between two looks.

    Args:
        optimizer: the optimizer.
        seen: what `seen` was when a run was saved: by matrix, the counts at the last look and the steps until then.
    """

    def __init__(self, optimizer: LowRankOptimizer, seen: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self.declared = optimizer.gauges()
        self.seen: dict[str, dict[str, float]] = {name: dict(counts) for name, counts in (seen or {}).items()}
        if seen is None:  # of a run that goes on from a checkpoint which does not know
            found = list(matrices(optimizer))
            self.values(found, readings(found, self.declared))

    def values(self, found: Sequence[Matrix], read: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """Return what every matrix's gauges show, and take note of the counts.

        Args:
            found: the matrices.
            read: what `readings` gives of them.

        Returns:
            By gauge: the value at the last step; of a counted one the share of the steps since the last look.
        """
        return [self._of(matrix, row) for matrix, row in zip(found, read, strict=True)]

    def _of(self, matrix: Matrix, row: Mapping[str, float]) -> dict[str, float]:
        shown = {name: row[name] for name, gauge in self.declared.items() if name in row and not gauge.counted}
        counts = {name: row[name] for name, gauge in self.declared.items() if name in row and gauge.counted}
        if counts:
            before = self.seen.get(matrix.name, {})
            steps = matrix.steps - before.get("step", 0)
            self.seen[matrix.name] = {"step": matrix.steps, **counts}
            if steps > 0:
                shown |= {name: (count - before.get(name, 0.0)) / steps for name, count in counts.items()}
        return {name: value for name, value in shown.items() if isfinite(value)}


def readings(found: Sequence[Matrix], gauges: Iterable[str]) -> list[dict[str, float]]:
    """Return the numbers of every matrix's last refresh, without what is unknown, and the state of its gauges.

    All come in one transfer from the device. Of a stack of matrices a gauge is the mean.
    """
    if not found:
        return []
    names = [[*REPORT, *(name for name in gauges if name in matrix.state)] for matrix in found]
    columns = []
    for matrix, some in zip(found, names, strict=True):
        read = [local(matrix.state[name]).float().mean().reshape(1) for name in some[len(REPORT) :]]
        columns.append(torch.cat([matrix.state["report"].float(), *read]).to(found[0].weight.device))
    values = iter(torch.cat(columns).tolist())
    rows = [{name: next(values) for name in some} for some in names]
    return [{k: v for k, v in row.items() if k not in REPORT or v != UNKNOWN} for row in rows]


def by_type(values: Mapping[str, float]) -> dict[str, float]:
    """Return the mean over the matrices of every module type, from values by name of the module."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, value in values.items():
        found[module_type(name)].append(value)
    return {kind: fmean(some) for kind, some in found.items()}
