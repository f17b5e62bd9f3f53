"""The figures: each draws what the runs have, or is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_lowrank.observe.report import costs, curves, style, subspaces
from hf_lowrank.observe.report.runs import Run


@dataclass(frozen=True)
class Figure:
    """One figure on the page.

    Attributes:
        name: of its PNG file.
        title: what it shows.
        caption: how to read it.
        svg: the drawing.
    """

    name: str
    title: str
    caption: str
    svg: str


def draw(runs: Sequence[Run], folder: Path, *, matrices: int) -> list[Figure]:
    """Draw all figures for which there is something, and write their PNG files."""
    with style.settings():
        drawings = [
            *curves.losses(runs),
            *curves.perplexities(runs),
            *curves.metrics(runs),
            curves.gap(runs),
            *(subspaces.of_one(run, i) for i, run in enumerate(runs, 1)),
            subspaces.captured(runs),
            curves.gauges(runs),
            curves.update_rank(runs),
            subspaces.spectrum(runs, matrices),
            costs.memory(runs),
            costs.step_times(runs),
        ]
        return [
            Figure(d.name, d.title, d.caption, style.save(d.canvas, d.name, folder))
            for d in drawings
            if d.canvas is not None
        ]
