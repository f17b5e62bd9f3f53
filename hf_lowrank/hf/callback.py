"""LowRankCallback: what the subspaces do, in the Trainer's logs and in files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from transformers import TrainerCallback

from hf_lowrank.hf.model_card import TAG
from hf_lowrank.observe import metrics, records
from hf_lowrank.observe.describe import headline, resolved_options, summary
from hf_lowrank.observe.metrics import REPORT, reports
from hf_lowrank.observe.records import FIRST_FILE, REFRESH_FILE, RUN_FILE, STEPS_FILE
from hf_lowrank.optimizer import LowRankOptimizer
from hf_lowrank.state import view


__all__ = ["REFRESH_FILE", "RUN_FILE", "STEPS_FILE", "LowRankCallback", "reports", "resolved_options", "summary"]

logger = logging.getLogger("hf_lowrank")
MIB = 2**20
SAVED = "hf_lowrank"
"""Key of what the callback keeps in trainer_state.json."""


class LowRankCallback(TrainerCallback):  # type: ignore[misc]
    """Adds `lowrank/...` to every training log, and writes refreshes and step times to files in the output folder.

    In every log, as means over matrices: overlap: ||U^T V||_F^2 / r of the last basis with the one before (I3S paper,
    eq. 3); overlap_first: with the first one; energy: share of the gradient's squared norm inside the basis at its
    refresh; stable_rank: ||G||_F^2 / ||G||_2^2 there (GaLore paper, section 3.2); limited: share of the steps since
    the last log in which a limiter was active; residual_share: of the gradient's squared norm outside the
    subspace at the last step, where a method keeps it. Further refreshes: so far, over all matrices; refresh_ms: time
    of the refreshes since the last log; skipped: steps left out for a gradient that was not finite, over all
    parameters; state_mib: the optimizer's state.

    After a refresh what is known per matrix also by module type, as overlap/q; after a checkpoint update_rank, the
    effective rank of what the weights changed by since the checkpoint before. Where a CUDA device works ahead of the
    host, times are the host's.

    It is attached by itself where the optimizers are registered, and does nothing for any other optimizer. One that is
    given to Trainer by hand lends its arguments to the one that is there already.

    Args:
        first_overlap: compare with the first subspaces; see `metrics.FirstSubspaces` for what it keeps.
        update_rank: "estimate", "exact" (keeps a copy of the matrices on the CPU) or "off".
    """

    def __init__(self, *, first_overlap: bool = True, update_rank: str = "estimate") -> None:
        if update_rank not in ("estimate", "exact", "off"):
            raise ValueError(f"update_rank must be one of estimate, exact, off, got {update_rank!r}")
        self.optimizer: LowRankOptimizer | None = None
        self.first_overlap, self.update_rank = first_overlap, update_rank
        self._clipping: float | None = None
        self._step_began = self._update_began = self._update_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the optimizer; write the resolved options; drop lines that a resumed run will write again."""
        optimizer = kwargs.get("optimizer")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self.optimizer = optimizer if isinstance(optimizer, LowRankOptimizer) else None
        if self.optimizer is None:
            return
        first = getattr(self.optimizer, "_reported_in", None)
        if first is not None and first[0] is state:  # a second callback: the first one reports, before any reporter
            first[1].first_overlap, first[1].update_rank = self.first_overlap, self.update_rank
            self.optimizer = None
            return
        self.optimizer._reported_in = (state, self)
        self.optimizer.tell(total_steps=state.max_steps)  # for the rules that switch at a share of the run
        self._begin(Path(args.output_dir), state)
        model = kwargs.get("model")
        if model is not None and hasattr(model, "add_model_tags"):
            model.add_model_tags([TAG])
        if state.is_world_process_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            described = resolved_options(self.optimizer)
            if model is not None:
                described["memory"] = metrics.component_bytes(self.optimizer, model)
            (self.folder / RUN_FILE).write_text(json.dumps(described, indent=2) + "\n")
            records.keep_up_to(self.folder / REFRESH_FILE, state.global_step)
            steps = records.keep_up_to(self.folder / STEPS_FILE, state.global_step)
            self._started -= steps[-1].get("seconds", 0.0) if steps else 0.0

    def _begin(self, folder: Path, state: Any) -> None:
        """Set up for a run, which may be the rest of one."""
        assert self.optimizer is not None
        self.folder = folder
        self._started = perf_counter()
        self._steps: list[dict[str, Any]] = []
        self._logged_seconds = self.optimizer.refresh_seconds
        self._written = {name: refreshes for name, refreshes, _ in reports(self.optimizer)}
        self._firsts: dict[str, float] = {}  # last overlap with the first subspace, by matrix
        self._rank: metrics.UpdateRank | None = None
        self._measured_at = state.global_step
        self._limiter = metrics.LimiterActivity()
        self._limiter.look(self.optimizer)
        rows = [row for row in state.log_history if "lowrank/refreshes" in row]
        self._logged_refreshes = rows[-1]["lowrank/refreshes"] if rows else 0
        saved = (state.stateful_callbacks or {}).get(SAVED, {})
        self._pending: dict[str, float] = dict(saved.get("pending", {}))
        if "limited" in saved:
            self._limiter.resume(saved["limited"])
        self._first = metrics.FirstSubspaces()
        self._first_file = Path(saved.get("folder", folder)) / FIRST_FILE
        if saved and state.is_world_process_zero:
            self._firsts = dict(saved.get("firsts", {}))
            for file in (folder / FIRST_FILE, self._first_file):
                if file.exists():
                    self._first.load(file)
                    break

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep Trainer from clipping what is left of the gradients where the optimizer clips the projected ones."""
        if self.optimizer is None:
            return
        if any(group["max_grad_norm"] for group in self.optimizer.param_groups):
            self._clipping, args.max_grad_norm = args.max_grad_norm, 0.0
        if self._rank is None and self.update_rank != "off":
            self._rank = metrics.UpdateRank(exact=self.update_rank == "exact")
            self._rank.measure(self._matrices())
        self._step_began = perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give Trainer its argument back: it is part of what is saved."""
        self._update_began = perf_counter()
        if self._clipping is not None:
            args.max_grad_norm, self._clipping = self._clipping, None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time of the update."""
        self._update_seconds = perf_counter() - self._update_began

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the refreshes of this step; measure what the next checkpoint is to hold."""
        if self.optimizer is None:
            return
        now = perf_counter()
        refreshed = self._refreshed(state, control.should_log)
        self._limiter.look(self.optimizer)
        if state.is_world_process_zero:
            row = {
                "step": state.global_step,
                "ms": _ms(now - self._step_began),
                "optimizer_ms": _ms(self._update_seconds),
            }
            self._steps.append(row | {"refreshes": refreshed, "seconds": round(now - self._started, 3)})
        if control.should_save:
            self._before_saving(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As at the end of a step, where Trainer saves by epochs."""
        if self.optimizer is not None and control.should_save:
            self._before_saving(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As before a save, where that was not announced: Trainer saves the best model right after an evaluation."""
        if self.optimizer is not None:
            self._before_saving(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks of the layerwise mode off the model."""
        if self.optimizer is not None:
            self.optimizer.remove_hooks()
            self._flush()

    def _refreshed(self, state: Any, logging_now: bool) -> int:
        """Write a line for every matrix that was refreshed in this step; return how many there are.

        A subspace that moves at every step has its lines at its first step and at those that are logged.
        """
        assert self.optimizer is not None
        fresh = []
        for name, p, group, s in metrics.matrices(self.optimizer):
            if (refreshes := int(s["refreshes"])) != self._written.get(name, 0):
                self._written[name] = refreshes
                fresh.append((name, p, group, s))
        shown = [
            item
            for item in fresh
            if logging_now or item[3]["refreshes"] == 1 or item[3]["refresh_at"] > item[3]["step"]
        ]
        if not shown or not state.is_world_process_zero:
            return len(fresh)
        lines = []
        values = metrics.known(REPORT, [s["report"] for *_, s in shown])
        before = len(self._first.sketches)
        for (name, p, group, s), row in zip(shown, values, strict=True):
            if self.first_overlap and (first := self._overlap_with_first(name, p, group, s)) is not None:
                self._firsts[name] = row["overlap_first"] = round(first, 6)
            lines.append({"step": state.global_step, "module": name, "refresh": int(s["refreshes"]), **row})
        records.append(self.folder / REFRESH_FILE, lines)
        if len(self._first.sketches) != before:
            self._first_file = self.folder / FIRST_FILE
            self._first.save(self._first_file)
        return len(fresh)

    def _overlap_with_first(self, name: str, p: Any, group: Any, s: Any) -> float | None:
        if s["refreshes"] > 1 and name not in self._first.sketches:
            return None  # the first one was not seen
        assert self.optimizer is not None
        basis = metrics.stored_basis(self.optimizer.plan(p), s)
        return None if basis is None else self._first.overlap(name, basis)

    def _matrices(self) -> list[tuple[str, Any]]:
        assert self.optimizer is not None
        declared = enumerate(self.optimizer.declared())
        return [(name or f"parameter {i}", p) for i, (name, p, config, _) in declared if config.low_rank]

    def _before_saving(self, state: Any) -> None:
        """Measure the rank of the update, on all processes, and put what a resumed run needs into the state."""
        if self._rank is not None and self._measured_at != state.global_step:
            self._measured_at = state.global_step
            found = self._rank.measure(self._matrices())
            values = {"lowrank/update_rank": fmean(found.values())} if found else {}
            values |= {f"lowrank/update_rank/{kind}": v for kind, v in metrics.by_type(found).items()}
            self._pending = {key: round(value, 3) for key, value in values.items()}
            if found and state.is_world_process_zero:
                state.log_history.append({**self._pending, "epoch": state.epoch, "step": state.global_step})
        self._flush()
        self._keep(state)

    def _keep(self, state: Any) -> None:
        """Put what a resumed run needs into the state that Trainer saves."""
        kept = {"pending": self._pending, "firsts": dict(self._firsts), "limited": self._limiter.counts}
        state.stateful_callbacks[SAVED] = {**kept, "folder": str(self._first_file.parent.resolve())}

    def _flush(self) -> None:
        records.append(self.folder / STEPS_FILE, self._steps)
        self._steps = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the metrics to a training log, for the reporters and for the log history."""
        if self.optimizer is None or logs is None or "loss" not in logs:
            return
        found = self.metrics(self.optimizer)
        logs.update({**found, **self._pending})
        self._pending = {}  # they have their own row in the history, at the step of the checkpoint
        if state.log_history:
            state.log_history[-1].update(found)
        self._keep(state)
        if state.is_world_process_zero:
            self._flush()
            if "lowrank/refreshes" in found and any("/" in key.removeprefix("lowrank/") for key in found):
                logger.info("step %d: %s", state.global_step, headline(found))

    def metrics(self, optimizer: LowRankOptimizer) -> dict[str, float]:
        """Return the metrics since the last call."""
        found = reports(optimizer)
        result: dict[str, float] = {}
        values = metrics.known(REPORT, [report for *_, report in found])
        columns = {
            key: {n: row[key] for (n, *_), row in zip(found, values, strict=True) if key in row} for key in REPORT
        }
        columns["overlap_first"] = self._firsts
        columns["residual_share"] = metrics.residual_shares(optimizer)
        result |= {f"lowrank/{key}": round(fmean(column.values()), 6) for key, column in columns.items() if column}
        refreshes = sum(count for _, count, _ in found)
        if refreshes != self._logged_refreshes:
            for key, column in columns.items():
                result |= {f"lowrank/{key}/{kind}": round(v, 6) for kind, v in metrics.by_type(column).items()}
        self._logged_refreshes = refreshes
        result["lowrank/refreshes"] = refreshes
        result["lowrank/refresh_ms"] = _ms(optimizer.refresh_seconds - self._logged_seconds)
        self._logged_seconds = optimizer.refresh_seconds
        if (share := self._limiter.share()) is not None:
            result["lowrank/limited"] = round(share, 6)
        states = optimizer.state.values()
        result["lowrank/skipped"] = sum(int(s["skipped"]) for s in states)
        if optimizer.projected_grad_norm is not None:
            result["lowrank/projected_grad_norm"] = round(optimizer.projected_grad_norm, 6)
        result["lowrank/state_mib"] = round(sum(map(view.nbytes, states)) / MIB, 3)
        return result


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
