"""The eight tasks of GLUE, in the order of the papers' tables."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.shared.common import stop


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        title: its name in tables.
        columns: the columns of text, one or two.
        labels: number of classes; 1 for a regression.
        metrics: what `evaluate` reports, the papers' main metric first.
        validation: splits of the hub that are evaluated; the first is the one in the tables.
    """

    title: str
    columns: tuple[str, ...]
    labels: int
    metrics: tuple[str, ...]
    validation: tuple[str, ...] = ("validation",)


PAIR = ("sentence1", "sentence2")

TASKS = {
    "cola": Task("CoLA", ("sentence",), 2, ("matthews_correlation",)),
    "stsb": Task("STS-B", PAIR, 1, ("pearson", "spearmanr")),
    "mrpc": Task("MRPC", PAIR, 2, ("f1", "accuracy")),
    "rte": Task("RTE", PAIR, 2, ("accuracy",)),
    "sst2": Task("SST-2", ("sentence",), 2, ("accuracy",)),
    "mnli": Task("MNLI", ("premise", "hypothesis"), 3, ("accuracy",), ("validation_matched", "validation_mismatched")),
    "qnli": Task("QNLI", ("question", "sentence"), 2, ("accuracy",)),
    "qqp": Task("QQP", ("question1", "question2"), 2, ("accuracy", "f1")),
}


def task_named(name: str) -> Task:
    """Return a task, or end with one sentence if there is none of this name."""
    if name not in TASKS:
        stop(f"unknown task {name!r}; valid are {', '.join(TASKS)}, and all")
    return TASKS[name]
