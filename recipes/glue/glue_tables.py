"""The papers' tables with our rows in them, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import glue_papers
from glue_tasks import TASKS


TITLES = [task.title for task in TASKS.values()]
Runs = dict[str, dict[str, list[dict[str, Any]]]]
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
    accuracy = [*_papers(glue_papers.GALORE, "GaLore's paper", theirs), *_scores(runs, {}, memory=True)]
    seconds = [*_papers(glue_papers.SUBTRACK_SECONDS, "SubTrack's paper", theirs), *_seconds(runs)]
    f1 = [*_papers(_averaged(glue_papers.SUBTRACK), "SubTrack's paper", theirs), *_scores(runs, {"qqp": "f1"})]
    parts = [
        "Scores, layout of GaLore's Table 4: Matthews correlation, Pearson (Spearman), F1 (accuracy) for MRPC, "
        "accuracy (F1) for QQP, accuracy. Memory is weights and optimizer state.",
        markdown(["", "Memory", *TITLES, "Avg"], accuracy),
        "Scores, layout of SubTrack's Table 4: as above, but F1 (accuracy) for QQP.",
        markdown(["", *TITLES, "Avg"], f1),
        "Seconds of training, layout of SubTrack's Table 1.",
        markdown(["", *TITLES, "Avg"], seconds),
        note,
    ]
    return "\n\n".join(parts) + "\n"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return an aligned Markdown table; columns are right-aligned except the first."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, rule)
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    )


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Return the mean of the seeds, and with several their standard deviation."""
    if not values:
        return "-"
    text = form.format(mean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(stdev(values))}"


def _scores(runs: Runs, main: dict[str, str], *, memory: bool = False) -> list[list[str]]:
    """Return our rows; `main` says which metric comes first where it is not the task's own first."""
    lines = []
    for row, by_task in runs.items():
        cells, means = [], []
        for name, task in TASKS.items():
            metrics = sorted(task.metrics, key=lambda metric, name=name: metric != main.get(name, metric))
            columns = [_values(by_task.get(name, []), lambda run, m=m: 100 * _main_split(run)[m]) for m in metrics]
            texts = list(map(spread, columns))
            cells.append(f"{texts[0]} ({texts[1]})" if len(texts) > 1 and columns[0] else texts[0])
            means += [mean(columns[0])] if columns[0] else []
        average = f"{mean(means):.2f}" if len(means) == len(TASKS) else "-"
        lines.append([row, *([_memory(by_task)] if memory else []), *cells, average])
    return lines


def _seconds(runs: Runs) -> list[list[str]]:
    lines = []
    for row, by_task in runs.items():
        columns = [_values(by_task.get(name, []), lambda run: run["train_seconds"]) for name in TASKS]
        full = all(columns)
        average = f"{mean(map(mean, columns)):.1f}" if full else "-"
        lines.append([row, *(spread(column, "{:.1f}") for column in columns), average])
    return lines


def _values(runs: list[dict[str, Any]], get: Callable[[dict[str, Any]], float]) -> list[float]:
    return [get(run) for run in runs]


def _main_split(run: dict[str, Any]) -> dict[str, float]:
    return next(iter(run["metrics"].values()))


def _memory(by_task: dict[str, list[dict[str, Any]]]) -> str:
    """Return the largest sum of weights and state; on CUDA the peak of the process as well."""
    runs = [run for found in by_task.values() for run in found]
    text = f"{max(run['weights_mib'] + run['state_mib'] for run in runs):.0f}M"
    peaks = [run["peak_mib"] for run in runs if "peak_mib" in run]
    return f"{text} (peak {max(peaks):.0f}M)" if peaks else text


def _papers(rows: dict[str, tuple[Any, ...]], source: str, shown: bool) -> list[list[str]]:
    """Return the rows of a paper as texts, or none."""
    return [[f"{name}, {source}", *map(_text, row)] for name, row in rows.items() if shown]


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.2f}"


def _averaged(rows: dict[str, tuple[float, ...]]) -> dict[str, tuple[float | str, ...]]:
    return {name: (*row, f"{mean(row):.2f}") for name, row in rows.items()}
