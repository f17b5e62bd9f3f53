"""LowRankCallback: what the subspaces do, in the Trainer's logs and in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_lowrank import state
from hf_lowrank.layerwise import remove_hooks
from hf_lowrank.matrices import clamp_rank
from hf_lowrank.optimizer import LowRankOptimizer
from hf_lowrank.steps import UNKNOWN


RUN_FILE = "hf_lowrank.json"
"""In the output folder: the resolved options of every group."""

REFRESH_FILE = "hf_lowrank_refreshes.jsonl"
"""In the output folder: one line per refresh of a matrix."""

REPORT = ("overlap", "energy", "stable_rank")
MIB = 2**20


class LowRankCallback(TrainerCallback):  # type: ignore[misc]
    """Adds `lowrank/...` to every training log and writes one line per refresh to a JSONL file.

    overlap: ||U^T V||_F^2 / r of the last basis with the one before, mean over matrices (I3S paper, eq. 3); energy:
    share of the gradient's squared norm inside the basis at its refresh; stable_rank: ||G||_F^2 / ||G||_2^2 there
    (GaLore paper, section 3.2); refreshes: so far, over all matrices; refresh_ms: time of the refreshes since the last
    log;
    skipped: steps left out for a gradient that was not finite, over all parameters; state_mib: the optimizer's state.

    It is attached by itself where the optimizers are registered, and does nothing for any other optimizer.
    """

    def __init__(self) -> None:
        self.optimizer: LowRankOptimizer | None = None
        self._logged_seconds = 0.0
        self._clipping: float | None = None
        self._written: dict[str, int] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the optimizer; write the resolved options; drop lines that a resumed run will write again."""
        optimizer = kwargs.get("optimizer")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self.optimizer = optimizer if isinstance(optimizer, LowRankOptimizer) else None
        if self.optimizer is None:
            return
        if getattr(self.optimizer, "_reported_in", None) is state:  # a second callback: the first one reports
            self.optimizer = None
            return
        self.optimizer._reported_in = state
        for group in self.optimizer.param_groups:  # the rules that switch at a share of the run
            if "total_steps" in group:
                group["total_steps"] = state.max_steps
        self._logged_seconds = self.optimizer.refresh_seconds
        self._written = {name: refreshes for name, refreshes, _ in reports(self.optimizer)}
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / RUN_FILE).write_text(json.dumps(resolved_options(self.optimizer), indent=2) + "\n")
            _keep_lines_up_to(folder / REFRESH_FILE, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep Trainer from clipping what is left of the gradients where the optimizer clips the projected ones."""
        if self.optimizer is not None and any(group["max_grad_norm"] for group in self.optimizer.param_groups):
            self._clipping, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give Trainer its argument back: it is part of what is saved."""
        if self._clipping is not None:
            args.max_grad_norm, self._clipping = self._clipping, None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks of the layerwise mode off the model."""
        if self.optimizer is not None:
            remove_hooks(self.optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the refreshes of this step."""
        if self.optimizer is None:
            return
        lines = []
        for name, refreshes, report in reports(self.optimizer):
            if refreshes != self._written.get(name, 0):
                self._written[name] = refreshes
                values = dict(zip(REPORT, report.tolist(), strict=True))
                known = {key: value for key, value in values.items() if value != UNKNOWN}
                lines.append(json.dumps({"step": state.global_step, "module": name, "refresh": refreshes, **known}))
        if lines and state.is_world_process_zero:
            with (Path(args.output_dir) / REFRESH_FILE).open("a") as file:
                file.write("\n".join(lines) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the metrics to a training log, for the reporters and for the log history."""
        if self.optimizer is None or logs is None or "loss" not in logs:
            return
        metrics = self.metrics(self.optimizer)
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def metrics(self, optimizer: LowRankOptimizer) -> dict[str, float]:
        """Return the metrics since the last call."""
        found = list(reports(optimizer))
        result: dict[str, float] = {}
        if found:
            rows = torch.stack([report.double().cpu() for _, _, report in found])
            for name, column in zip(REPORT, rows.unbind(1), strict=True):
                known = column[column != UNKNOWN]
                if known.numel():
                    result[f"lowrank/{name}"] = round(known.mean().item(), 6)
        result["lowrank/refreshes"] = sum(refreshes for _, refreshes, _ in found)
        result["lowrank/refresh_ms"] = round(1e3 * (optimizer.refresh_seconds - self._logged_seconds), 3)
        self._logged_seconds = optimizer.refresh_seconds
        states = optimizer.state.values()
        result["lowrank/skipped"] = sum(int(s["skipped"]) for s in states)
        if optimizer.projected_grad_norm is not None:
            result["lowrank/projected_grad_norm"] = round(optimizer.projected_grad_norm, 6)
        result["lowrank/state_mib"] = round(sum(map(_nbytes, states)) / MIB, 3)
        return result


def reports(optimizer: LowRankOptimizer) -> list[tuple[str, int, torch.Tensor]]:
    """Return (name, refreshes so far, last report) of every matrix that has had a refresh, in group order."""
    found = []
    for name, p, *_ in optimizer.declared():
        s = optimizer.state.get(p, {})
        if "refreshes" in s and s["refreshes"] > 0:
            found.append((name.removesuffix(".weight"), int(s["refreshes"]), s["report"]))
    return found


def resolved_options(optimizer: LowRankOptimizer) -> dict[str, Any]:
    """Return every group's options and the names of its parameters, as plain data."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {"optimizer": optimizer.defaults["method"], "groups": groups}


def summary(optimizer: LowRankOptimizer) -> str:
    """Describe in one line what is projected, at which rank and learning rates, and what the state costs."""
    matrices = [(p, group) for group in optimizer.param_groups if "rank" in group for p in group["params"]]
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    declared = optimizer.declared_bytes()
    adamw = sum(8 * p.numel() for p in everything)
    ranks = sorted({clamp_rank(group["rank"], *p.shape[-2:]) for p, group in matrices})
    lr = optimizer.param_groups[0]["lr"]
    text = f"{optimizer.defaults['method']}: {len(matrices)} matrices at rank {_span(ranks)}"
    if matrices:
        scale = matrices[0][1]["scale"]
        text += f", lr {lr * scale:g} ({lr:g} x scale {scale:g})"
    text += f"; {len(everything) - len(matrices)} dense parameters, lr {lr:g}"
    return text + f"; state {declared / MIB:.1f} MiB (AdamW: {adamw / MIB:.1f} MiB)"


def _span(values: list[int]) -> str:
    return f"{values[0]}-{values[-1]}" if len(values) > 1 else str(values[0]) if values else "-"


def _nbytes(s: Mapping[str, Any]) -> int:
    return state.nbytes(s)


def _keep_lines_up_to(file: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again; a line that was cut short goes too."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue
    file.write_text("".join(kept))
