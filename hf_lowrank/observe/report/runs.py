"""What a run's folder holds, read as far as it can be: a broken or missing file is a sentence, not an error."""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_lowrank.observe import records


STATE_FILE = "trainer_state.json"

_LANGUAGE_MODEL = re.compile(r"LMHead|CausalLM|MaskedLM|Seq2SeqLM|ConditionalGeneration|PreTraining")
_TASK = re.compile(r"For[A-Z]")
"""In the names of transformers' classes: models with a language model's head, and with any."""

_NO_METRIC = re.compile(r"(^|_)loss$|^runtime$|_per_second$|_time$|^mem_|^init_mem_")
"""What Trainer logs of an evaluation that is no metric."""

LARGEST = 1e100
"""Beyond it nothing is a measurement, and axes overflow."""

Rows = list[dict[str, Any]]
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """One output folder.

    Attributes:
        folder: where it is.
        name: how figures call it.
        history: Trainer's log history.
        refreshes: one row per refresh of a matrix.
        steps: one row per step, with its milliseconds.
        described: resolved options and bytes, as in records.RUN_FILE; nothing for another optimizer.
        model: name of the model's class, "" if unknown.
        checkpoints: (step, folder), in order.
        problems: what could not be read.
    """

    folder: Path
    name: str
    history: Rows = field(default_factory=list)
    refreshes: Rows = field(default_factory=list)
    steps: Rows = field(default_factory=list)
    described: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    checkpoints: tuple[tuple[int, Path], ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        return not (self.history or self.refreshes or self.steps)

    @property
    def optimizer(self) -> str:
        """The optimizer's name where the run was one of ours."""
        return str(self.described.get("optimizer", "another optimizer"))

    @property
    def rank(self) -> float | None:
        """The rank that was asked for."""
        groups = self.described.get("groups", ())
        return next((group["rank"] for group in groups if is_number(group.get("rank"))), None)

    @property
    def language_model(self) -> bool:
        """Whether the loss is that of a language model, whose exp is a perplexity.

        Its class says so; where that is not known, or says nothing, a run that has no metrics counts as one.
        """
        if _LANGUAGE_MODEL.search(self.model):
            return True
        return not (_TASK.search(self.model) or self.metrics())

    @property
    def gauges(self) -> dict[str, str]:
        """What the parts of the method show, in words, by name."""
        return {name: str(gauge.get("help", name)) for name, gauge in self.described.get("gauges", {}).items()}

    def metrics(self) -> dict[str, Points]:
        """Return what the run was evaluated by besides the loss, by name: accuracy, pearson ..."""
        keys = dict.fromkeys(key for row in self.history for key in row)
        names = (key.removeprefix("eval_") for key in keys if key.startswith("eval_"))
        return {
            name: points for name in names if not _NO_METRIC.search(name) and (points := self.curve(f"eval_{name}"))
        }

    def curve(self, key: str) -> Points:
        """Return (step, value) of everything that was logged under a key and is a finite number."""
        rows = (row for row in self.history if is_number(row.get("step")) and is_number(row.get(key)))
        return [(float(row["step"]), float(row[key])) for row in rows]

    def measured(self) -> Points:
        """Return (step, seconds since the start) of every step."""
        return [(float(row["step"]), float(row["seconds"])) for row in self.steps if is_number(row.get("seconds"))]

    def seconds(self) -> tuple[Callable[[float], float] | None, bool]:
        """Return seconds of training as a function of the step, if known, and whether that was measured step by step.

        Without a file of steps the whole training time is spread evenly over the steps.
        """
        measured = sorted(dict(self.measured()).items())  # of a step that was run again the last
        if len(measured) > 1:
            return lambda step: _interpolate(measured, step), True
        sessions, last = self.curve("train_runtime"), self.last_step
        if not sessions or not last:
            return None, False
        rate = sum(seconds for _, seconds in sessions) / last  # sessions that did not end have left no time
        return lambda step: float(rate * step), False

    @property
    def last_step(self) -> float:
        """The last step that is known of."""
        return _last([*self.history, *self.steps])

    @property
    def diverged(self) -> int | None:
        """The step from which on no training loss is a finite number, if there is one."""
        losses = [(row["step"], row["loss"]) for row in self.history if "loss" in row and is_number(row.get("step"))]
        good = max((i for i, (_, loss) in enumerate(losses) if is_number(loss)), default=-1)
        return int(losses[good + 1][0]) if good + 1 < len(losses) else None


def read_run(folder: Path) -> Run:
    """Read what a folder holds."""
    run = Run(folder, folder.resolve().name)
    if not folder.is_dir():
        return replace(
            run, problems=("there is no such folder" if not folder.exists() else "is a file, not a folder",)
        )
    problems: list[str] = []
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir() if path.is_dir())
    checkpoints = tuple(sorted((int(match[1]), path) for match, path in found if match))
    history = _history(folder, checkpoints, problems)
    described = _json(folder / records.RUN_FILE, problems)
    rows = {}
    for file in (records.REFRESH_FILE, records.STEPS_FILE):
        rows[file], broken = records.read(folder / file)
        if broken:
            problems.append(f"{file}: {broken} unreadable line{'s' * (broken > 1)} left out")
    run = replace(
        run,
        history=history,
        described=_well_formed(described),
        model=_model(described, folder, checkpoints),
        refreshes=[row for row in rows[records.REFRESH_FILE] if "module" in row],
        steps=[row for row in rows[records.STEPS_FILE] if is_number(row.get("ms"))],
        checkpoints=checkpoints,
    )
    if run.diverged is not None:
        problems.append(f"losses from step {run.diverged} on are not finite numbers: the run diverged")
    if run.empty:
        problems.append(
            f"nothing to draw: neither a readable {STATE_FILE} (here or in a checkpoint) nor our own files"
        )
    return replace(run, problems=tuple(problems))


def name_runs(runs: Sequence[Run]) -> list[Run]:
    """Name runs by what tells their folders apart."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return list(runs)
    paths = [run.folder.resolve() for run in runs]
    common = Path(os.path.commonpath(paths)) if len(set(paths)) > 1 else paths[0].parent
    named = [str(path.relative_to(common)) for path in paths]
    return [
        replace(run, name=name if named.count(name) == 1 else f"{name} ({i})")
        for i, (run, name) in enumerate(zip(runs, named, strict=True), 1)
    ]


def _history(folder: Path, checkpoints: Sequence[tuple[int, Path]], problems: list[str]) -> Rows:
    """Return the longest log history: the folder's own, or that of the last checkpoint with a readable one.

    Trainer writes the folder's own when a training ends; one that goes on after that leaves it behind its checkpoints.
    """
    candidates = [folder / STATE_FILE, *(path / STATE_FILE for _, path in reversed(checkpoints))]
    found: list[Rows] = []
    for file in candidates:
        state = _json(file, problems)
        if isinstance(state, dict) and isinstance(state.get("log_history"), list):
            found.append([row for row in state["log_history"] if isinstance(row, dict)])
            if file.parent != folder:
                break
        elif state is not None:
            problems.append(f"{file.relative_to(folder)} has no log history")
    own, *later = found or [[]]
    if later and later[0][:1] == own[:1] and _last(later[0]) > _last(own):  # not one that an earlier run has left
        return later[0]
    if found:
        return own
    if not any(file.exists() for file in candidates):
        problems.append(f"no {STATE_FILE}, here or in a checkpoint: no losses (Trainer writes it when it saves)")
    return []


def _last(rows: Rows) -> float:
    return max((float(row["step"]) for row in rows if is_number(row.get("step"))), default=0.0)


def _model(described: Any, folder: Path, checkpoints: Sequence[tuple[int, Path]]) -> str:
    """Return the class of the model, from our own file or from a configuration that was saved with the weights."""
    if isinstance(described, dict) and isinstance(described.get("model"), str):
        return str(described["model"])
    for place in (folder, *(path for _, path in reversed(checkpoints))):
        config = _json(place / "config.json", [])
        names = config.get("architectures") if isinstance(config, dict) else None
        if isinstance(names, list) and names:
            return str(names[0])
    return ""


def _json(file: Path, problems: list[str]) -> Any:
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        place = file.name if file.parent.name.startswith("checkpoint-") is False else f"{file.parent.name}/{file.name}"
        what = "is empty" if not file.stat().st_size else f"is not valid JSON ({type(error).__name__})"
        problems.append(f"{place} {what}; was it cut short?")
        return None


def _well_formed(described: Any) -> dict[str, Any]:
    """Return what can be used of a description of a run."""
    if not isinstance(described, dict):
        return {}
    groups, memory, gauges = (described.get(key) for key in ("groups", "memory", "gauges"))
    return {
        **({"optimizer": described["optimizer"]} if isinstance(described.get("optimizer"), str) else {}),
        "groups": [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else [],
        "memory": {k: v for k, v in memory.items() if is_number(v)} if isinstance(memory, dict) else {},
        "gauges": {k: v for k, v in gauges.items() if isinstance(v, dict)} if isinstance(gauges, dict) else {},
    }


def is_number(value: Any) -> bool:
    """Tell whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST  # no NaN either


def _interpolate(points: Points, x: float) -> float:
    i = bisect_right(points, x, key=lambda point: point[0])
    x0, y0 = points[i - 1] if i else (0.0, 0.0)
    x1, y1 = points[i] if i < len(points) else (x0, y0)
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
