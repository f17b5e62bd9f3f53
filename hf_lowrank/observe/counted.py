"""What is counted between two looks: the refreshes since the last step, and everything since the last log."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from hf_lowrank.observe import metrics
from hf_lowrank.observe.first import Firsts
from hf_lowrank.observe.metrics import REPORT, Gauges, Matrix
from hf_lowrank.observe.units import MIB
from hf_lowrank.optimizer import LowRankOptimizer
from hf_lowrank.state import view


class Refreshes:
    """The refreshes of every step, as lines of a file.

    Args:
        optimizer: the optimizer.
        seen: what a checkpoint has of `gauges.seen`.
    """

    def __init__(self, optimizer: LowRankOptimizer, seen: Any) -> None:
        self.optimizer = optimizer
        self.gauges = Gauges(optimizer, seen)
        self.written = {matrix.name: matrix.refreshes for matrix in metrics.matrices(optimizer)}

    def new(self, *, logging: bool) -> tuple[int, list[Matrix]]:
        """Return how many matrices have been refreshed since the last call, and those of them that get a line.

        A subspace that moves at every step has its lines at its first step and at those that are logged.
        """
        fresh = [m for m in metrics.matrices(self.optimizer) if m.refreshes != self.written.get(m.name, 0)]
        self.written |= {matrix.name: matrix.refreshes for matrix in fresh}
        return len(fresh), [m for m in fresh if logging or m.refreshes == 1 or m.state["refresh_at"] > m.state["step"]]

    def lines(self, step: int, shown: list[Matrix], firsts: Firsts | None) -> list[dict[str, Any]]:
        """Return the lines of some matrices, with the overlap with the first subspace if `firsts` is given."""
        read = metrics.readings(shown, self.gauges.declared)
        gauged = self.gauges.values(shown, read)
        rows = []
        for matrix, row, gauges in zip(shown, read, gauged, strict=True):
            values = {key: row[key] for key in REPORT if key in row}
            if firsts is not None and (first := firsts.measure(matrix)) is not None:
                values["overlap_first"] = round(first, 6)
            values |= {key: round(value, 6) for key, value in gauges.items()}
            rows.append({"step": step, "module": matrix.name, "refresh": matrix.refreshes, **values})
        return rows


class SinceLog:
    """What has been counted since the last log.

    Args:
        optimizer: the optimizer.
        refreshes: how many refreshes the last log has.
        seen: what a checkpoint has of `gauges.seen`.
    """

    def __init__(self, optimizer: LowRankOptimizer, refreshes: float, seen: Any) -> None:
        self.optimizer = optimizer
        self.refreshes = refreshes
        self.refresh_seconds = optimizer.refresh_seconds
        self.gauges = Gauges(optimizer, seen)

    def metrics(self, overlaps_with_first: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics since the last call: means over matrices and, after a refresh, by type of module."""
        found = list(metrics.matrices(self.optimizer))
        read = metrics.readings(found, self.gauges.declared)
        rows = {m.name: row for m, row in zip(found, read, strict=True)}
        shown = {m.name: row for m, row in zip(found, self.gauges.values(found, read), strict=True)}
        columns = {key: {n: row[key] for n, row in rows.items() if key in row} for key in REPORT}
        columns["overlap_first"] = dict(overlaps_with_first)
        columns |= {key: {n: row[key] for n, row in shown.items() if key in row} for key in self.gauges.declared}
        result = {key: fmean(column.values()) for key, column in columns.items() if column}
        refreshes = sum(map(metrics.refreshes, self.optimizer.state.values()))
        if refreshes != self.refreshes:
            for key, column in columns.items():
                result |= {f"{key}/{kind}": value for kind, value in metrics.by_type(column).items()}
        self.refreshes = refreshes
        result = {key: round(value, 6) for key, value in result.items()} | self._totals()
        return {f"lowrank/{key}": value for key, value in result.items()}

    def _totals(self) -> dict[str, float]:
        """Return what is no mean over matrices."""
        seconds = self.optimizer.refresh_seconds - self.refresh_seconds
        self.refresh_seconds += seconds
        states = self.optimizer.state.values()
        norms = {"projected_grad_norm": self.optimizer.projected_grad_norm, "grad_norm": self.optimizer.grad_norm}
        return {
            "refreshes": self.refreshes,
            "refresh_ms": round(1e3 * seconds, 3),
            "skipped": sum(int(s["skipped"]) for s in states),
            **{key: round(norm, 6) for key, norm in norms.items() if norm is not None},
            "state_mib": round(sum(map(view.nbytes, states)) / MIB, 3),
        }
