"""A report on runs: one self-contained HTML page and a PNG file per figure, from what runs leave in their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        figures: names of the figures on it, in order; each is also a PNG file beside it.
        problems: what could not be read, one sentence each.
    """

    page: Path
    figures: tuple[str, ...]
    problems: tuple[str, ...]


def write_report(runs: Sequence[str | Path], out: str | Path, *, matrices: int = 2) -> Report:
    """Draw runs into a folder.

    Args:
        runs: output folders of Trainer; the first is the one that others are compared with.
        out: folder for index.html and the PNG files; made if need be.
        matrices: how many matrices of every module type have the change of their weights decomposed; 0: none.

    Raises:
        ValueError: if no folder holds anything to draw; nothing is written then.
    """
    from hf_lowrank.observe.report import figures, page
    from hf_lowrank.observe.report.runs import name_runs, read_run

    read = name_runs([read_run(Path(run)) for run in runs])
    problems = tuple(f"{run.folder}: {problem}" for run in read for problem in run.problems)
    drawable = [run for run in read if not run.empty]
    if not drawable:
        raise ValueError("; ".join(problems))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw(drawable, folder, matrices=matrices)
    file = folder / "index.html"
    file.write_text(page.render(drawable, drawn, problems), encoding="utf-8")
    return Report(file, tuple(figure.name for figure in drawn), problems)
