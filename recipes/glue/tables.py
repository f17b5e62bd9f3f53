"""The papers' tables with our rows in them, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from recipes.glue import papers
from recipes.glue.tasks import TASKS
from recipes.shared.display import markdown


TITLES = [task.title for task in TASKS.values()]
Run = dict[str, Any]
Runs = dict[str, dict[str, list[Run]]]
"""Results of finished trainings: row -> task -> one per seed."""


def tables(runs: Runs, *, model: str, note: str) -> str:
    """Return three tables: scores as GaLore and as SubTrack print them, and seconds.

    The papers' rows stand beside ours where the model is theirs; beside another one they would say nothing.

    Args:
        runs: what has been finished; a cell without a result has a dash, and so has the average of its row.
        model: the encoder, as it was named.
        note: what the numbers were measured on.
    """
    theirs = Path(model).name == "roberta-base"
    scores = [_scores(row, by_task) for row, by_task in runs.items()]
    with_memory = [[line[0], _memory(by_task), *line[1:]] for line, by_task in zip(scores, runs.values(), strict=True)]
    f1_for_qqp = [_scores(row, by_task, {"qqp": "f1"}) for row, by_task in runs.items()]
    seconds = [_seconds(row, by_task) for row, by_task in runs.items()]
    parts = [
        "Scores in the layout of GaLore's Table 4: Matthews correlation, Pearson (Spearman), F1 (accuracy) for MRPC, "
        "accuracy (F1) for QQP, accuracy. Memory is weights and optimizer state, the papers' in bf16.",
        markdown(["", "Memory", *TITLES, "Avg"], [*_papers("GaLore", papers.GALORE, theirs), *with_memory]),
        "Scores in the layout of SubTrack's Table 4: F1 (accuracy) for QQP. The paper leaves its averages blank.",
        markdown(["", *TITLES, "Avg"], [*_papers("SubTrack", _averaged(papers.SUBTRACK), theirs), *f1_for_qqp]),
        "Seconds of training in the layout of SubTrack's Table 1, the paper's for 2500 steps.",
        markdown(["", *TITLES, "Avg"], [*_papers("SubTrack", papers.SUBTRACK_SECONDS, theirs), *seconds]),
        note,
    ]
    return "\n\n".join(parts) + "\n"


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Return the mean of the seeds, and with several their standard deviation."""
    if not values:
        return "-"
    text = form.format(mean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(stdev(values))}"


def _scores(row: str, by_task: dict[str, list[Run]], first: dict[str, str] | None = None) -> list[str]:
    """Return a row of scores; `first` says which metric leads where it is not the task's own first."""
    leading = {name: task.metrics[0] for name, task in TASKS.items()} | (first or {})
    cells = []
    for name, task in TASKS.items():
        metrics = [leading[name], *(metric for metric in task.metrics if metric != leading[name])]
        texts = [spread([_score(run, metric) for run in by_task.get(name, [])]) for metric in metrics]
        cells.append(f"{texts[0]} ({texts[1]})" if len(texts) > 1 and name in by_task else texts[0])
    return [row, *cells, _average(by_task, lambda run, name: _score(run, leading[name]), "{:.2f}")]


def _seconds(row: str, by_task: dict[str, list[Run]]) -> list[str]:
    """Return a row of wall times, of the trainings whose time is known."""
    timed = {name: [run for run in runs if "train_seconds" in run] for name, runs in by_task.items()}
    by_task = {name: runs for name, runs in timed.items() if runs}
    cells = [spread([run["train_seconds"] for run in by_task.get(name, [])], "{:.1f}") for name in TASKS]
    return [row, *cells, _average(by_task, lambda run, name: run["train_seconds"], "{:.1f}")]


def _average(by_task: dict[str, list[Run]], value: Callable[[Run, str], float], form: str) -> str:
    """Return the mean over all tasks of the mean over seeds, or a dash where a task is missing."""
    if len(by_task) < len(TASKS):
        return "-"
    return form.format(mean(mean(value(run, name) for run in runs) for name, runs in by_task.items()))


def _score(run: Run, metric: str) -> float:
    """Return a metric on the first validation set, times 100."""
    return 100 * next(iter(run["metrics"].values()))[metric]


def _memory(by_task: dict[str, list[Run]]) -> str:
    """Return the largest sum of weights and state; on CUDA the peak of the process as well."""
    runs = [run for found in by_task.values() for run in found]
    text = f"{max(run['weights_mib'] + run['state_mib'] for run in runs):.0f}M"
    peaks = [run["peak_mib"] for run in runs if "peak_mib" in run]
    return f"{text} (peak {max(peaks):.0f}M)" if peaks else text


def _papers(paper: str, rows: dict[str, tuple[Any, ...]], shown: bool) -> list[list[str]]:
    """Return the rows of a paper as texts, or none."""
    return [[f"{name}, {paper}'s paper", *map(_text, row)] for name, row in rows.items() if shown]


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def _averaged(rows: dict[str, tuple[float, ...]]) -> dict[str, tuple[float | str, ...]]:
    return {name: (*row, f"{mean(row):.2f}") for name, row in rows.items()}
