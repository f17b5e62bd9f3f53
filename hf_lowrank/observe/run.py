"""One run as it is watched: its clock, its files, what it counts and what it measures at checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from torch import Tensor

from hf_lowrank.observe import metrics, records
from hf_lowrank.observe.counted import Refreshes, SinceLog
from hf_lowrank.observe.first import Firsts
from hf_lowrank.observe.records import REFRESH_FILE, RUN_FILE, STEPS_FILE
from hf_lowrank.observe.update_rank import UpdateRank
from hf_lowrank.optimizer import LowRankOptimizer


class StepClock:
    """The times of every step, by the host's clock."""

    def __init__(self) -> None:
        self.started = self.step_began = self.update_began = perf_counter()
        self.update_seconds = 0.0

    def go_on_from(self, seconds: float) -> None:
        """Count the seconds of the run from what an earlier part of it took."""
        self.started -= seconds

    def begin_step(self) -> None:
        """Start the step."""
        self.step_began = perf_counter()

    def begin_update(self) -> None:
        """Start the optimizer's part of it."""
        self.update_began = perf_counter()

    def end_update(self) -> None:
        """End the optimizer's part of it."""
        self.update_seconds = perf_counter() - self.update_began

    def row(self) -> dict[str, float]:
        """Return the milliseconds of the step and of the update, and the seconds of the run."""
        now = perf_counter()
        times = {"ms": 1e3 * (now - self.step_began), "optimizer_ms": 1e3 * self.update_seconds}
        return {key: round(value, 3) for key, value in {**times, "seconds": now - self.started}.items()}


class AtCheckpoints:
    """What is measured at checkpoints: the effective rank of what the weights changed by since the one before.

    Args:
        optimizer: the optimizer.
        step: where the run begins.
        pending: values that have been measured and are in no log yet.
    """

    def __init__(self, optimizer: LowRankOptimizer, step: int, pending: Mapping[str, float]) -> None:
        self.optimizer = optimizer
        self.measured_at = step
        self.pending = dict(pending)
        self.rank: UpdateRank | None = None

    def begin(self, *, exact: bool) -> None:
        """Take the weights as they are for the first ones, once."""
        if self.rank is None:
            self.rank = UpdateRank(exact=exact)
            self.rank.measure(self._weights())

    def measure(self, step: int) -> dict[str, float]:
        """Return the metrics of a checkpoint, on all processes; nothing at one that has been measured."""
        if self.rank is None or self.measured_at == step:
            return {}
        self.measured_at = step
        found = self.rank.measure(self._weights())
        values = {"lowrank/update_rank": fmean(found.values())} if found else {}
        values |= {f"lowrank/update_rank/{kind}": value for kind, value in metrics.by_type(found).items()}
        self.pending = {key: round(value, 3) for key, value in values.items()}
        return self.pending

    def _weights(self) -> list[tuple[str, Tensor]]:
        declared = enumerate(self.optimizer.declared())
        return [(name or f"parameter {i}", p) for i, (name, p, config, _) in declared if config.low_rank]


class Run:
    """What is known of a run, which may be the rest of one.

    Args:
        optimizer: the optimizer.
        folder: the run's output folder.
        step: where it begins.
        history: the log so far.
        saved: what `kept` was at the checkpoint that it goes on from; empty for a new run.
        main: whether this process writes.
    """

    def __init__(
        self,
        optimizer: LowRankOptimizer,
        folder: Path,
        *,
        step: int,
        history: Sequence[Mapping[str, Any]],
        saved: Mapping[str, Any],
        main: bool,
    ) -> None:
        self.optimizer, self.folder, self.main = optimizer, folder, main
        counts = saved.get("counts", {})
        logged = [row["lowrank/refreshes"] for row in history if "lowrank/refreshes" in row]
        self.clock = StepClock()
        self.firsts = Firsts(optimizer, folder, saved, read=main)
        self.refreshes = Refreshes(optimizer, counts.get("lines"))
        self.since_log = SinceLog(optimizer, logged[-1] if logged else 0, counts.get("log"))
        self.checkpoints = AtCheckpoints(optimizer, step, saved.get("pending", {}))

    def describe(self, described: Mapping[str, Any], step: int) -> None:
        """Write what the run is; drop the lines after `step`, which a resumed run writes again."""
        (self.folder / RUN_FILE).write_text(json.dumps(described, indent=2) + "\n")
        records.keep_up_to(self.folder / REFRESH_FILE, step)
        steps = records.keep_up_to(self.folder / STEPS_FILE, step)
        self.clock.go_on_from(steps[-1].get("seconds", 0.0) if steps else 0.0)

    def end_step(self, step: int, *, logging: bool, first_overlap: bool) -> None:
        """Write the lines of a step and of its refreshes, at once: nothing is lost when the next step fails."""
        times = self.clock.row()
        count, shown = self.refreshes.new(logging=logging)
        if not self.main:
            return
        lines = self.refreshes.lines(step, shown, self.firsts if first_overlap else None)
        records.append(self.folder / REFRESH_FILE, lines)
        if self.firsts.grown:
            self.firsts.save()
        seconds = times.pop("seconds")
        records.append(self.folder / STEPS_FILE, [{"step": step, **times, "refreshes": count, "seconds": seconds}])

    def log(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return the metrics since the last log, and those of a checkpoint that no log has had."""
        pending, self.checkpoints.pending = self.checkpoints.pending, {}
        return self.since_log.metrics(self.firsts.overlaps), pending

    def kept(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data."""
        counts = {"log": self.since_log.gauges.seen, "lines": self.refreshes.gauges.seen}
        return {"pending": dict(self.checkpoints.pending), **self.firsts.kept(), "counts": counts}
