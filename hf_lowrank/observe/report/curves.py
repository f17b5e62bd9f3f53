"""What is drawn from the log: losses, perplexities or a classifier's metrics, gauges, the rank of the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_lowrank.observe.report import style
from hf_lowrank.observe.report.drawing import Drawing
from hf_lowrank.observe.report.runs import Points, Run


PANELS = 4
"""Most metrics in one figure."""

_THIN: dict[str, Any] = {"linewidth": 1.0, "alpha": 0.65, "marker": ""}


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        label: of its vertical axis.
        lines: gives the lines of a run: their points, and whether they are drawn with markers.
    """

    label: str
    lines: Callable[[Run], list[tuple[Points, bool]]]


def losses(runs: Sequence[Run]) -> list[Drawing]:
    """Draw training and validation loss."""

    def lines(run: Run) -> list[tuple[Points, bool]]:
        training, validation = run.curve("loss"), run.curve("eval_loss")
        return [(training, not validation), (validation, True)]

    unit = "loss, nats per token" if all(run.language_model for run in runs) else "loss"
    caption = "With markers: validation; thin: training (with markers where there is no validation)."
    return _over_time(runs, "loss", "Loss", [Panel(unit, lines)], caption)


def perplexities(runs: Sequence[Run]) -> list[Drawing]:
    """Draw the perplexities of language models."""
    caption = "exp(loss), of the validation data where there are any."
    panel = Panel("perplexity", lambda run: [(_perplexity(run), True)])
    return _over_time(
        [run if run.language_model else None for run in runs], "perplexity", "Perplexity", [panel], caption, log=True
    )


def _perplexity(run: Run) -> Points:
    return [(step, perplexity(loss)) for step, loss in run.curve("eval_loss") or run.curve("loss")]


def perplexity(loss: float) -> float:
    """Return exp(loss), or what is largest of it."""
    return math.exp(min(loss, 700.0))


def metrics(runs: Sequence[Run]) -> list[Drawing]:
    """Draw the metrics that runs were evaluated by, each by its name."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics()))[:PANELS]
    panels = [Panel(named(name), lambda run, name=name: [(run.metrics().get(name, []), True)]) for name in names]  # type: ignore[misc]
    title = " and ".join(filter(None, [", ".join(map(named, names[:-1])), *map(named, names[-1:])]))
    return _over_time(runs, "metrics", title[:1].upper() + title[1:], panels, "Of the validation data.")


def named(metric: str) -> str:
    """Return a metric's name in words."""
    return metric.replace("_", " ")


def _over_time(
    runs: Sequence[Run | None], name: str, title: str, panels: Sequence[Panel], caption: str, *, log: bool = False
) -> list[Drawing]:
    """Draw lines against steps, and against seconds; None keeps the look of a run that is not drawn for its place."""
    drawings = []
    for over in ("steps", "seconds"):
        figure, axes = style.canvas(max(1, len(panels)))
        drawn = [
            _plot(one, run, i, panel, over)
            for panel, one in zip(panels, axes, strict=False)
            for i, run in enumerate(runs)
            if run is not None
        ]
        for panel, one in zip(panels, axes, strict=False):
            one.set_ylabel(panel.label)
            if log:
                style.log_scale(one)
        axes[-1].set_xlabel("training step" if over == "steps" else "seconds of training")
        text = caption + (_about_clocks([run for run in runs if run is not None]) if over == "seconds" else "")
        style.finish(figure, axes, whole_steps=over == "steps")
        drawings.append(Drawing(f"{name}_{over}", f"{title} against {over}", text, figure if any(drawn) else None))
    return drawings


def _plot(axes: Any, run: Run, i: int, panel: Panel, over: str) -> bool:
    """Draw one run's lines; tell whether there were any."""
    clock = run.seconds()[0] if over == "seconds" else float
    drawn = False
    for points, marked in panel.lines(run):
        if points and clock is not None:
            how = {"label": style.label(run.name)} if marked else _THIN
            steps, values = style.thin(points)
            axes.plot([clock(step) for step in steps], values, **style.look(i) | how)
            drawn = True
    return drawn


def _about_clocks(runs: Sequence[Run]) -> str:
    """Say of which runs the time of every step is not known."""
    clocks = [(run.name, *run.seconds()) for run in runs]
    spread = [name for name, clock, measured in clocks if clock and not measured]
    timeless = [name for name, clock, _ in clocks if clock is None]
    text = ""
    if spread:
        text += f" Of {', '.join(spread)} only the whole time is known; it is spread evenly over the steps."
    if timeless:
        text += f" The times of {', '.join(timeless)} are not known; trainer.save_state() keeps them."
    return text


def gap(runs: Sequence[Run]) -> Drawing:
    """Draw how far every run lies above the first, in perplexity or in the first metric that all have."""
    what, source, curves = _compared(runs)
    figure, (axes,) = style.canvas()
    base = dict(curves[0])
    for i, (run, curve) in enumerate(zip(runs[1:], curves[1:], strict=True), 1):
        if points := [(step, value - base[step]) for step, value in curve if step in base]:
            axes.plot(*style.thin(points), **style.look(i), label=style.label(run.name))
    drawn = bool(axes.lines)
    axes.axhline(0, color=style.INK, linewidth=1)
    axes.set(xlabel="training step", ylabel=f"difference of {style.label(what)}")
    caption = f"{what[:1].upper()}{what[1:]} ({source}) less that of {runs[0].name}, at the steps that both have."
    caption += " Below zero: better." if what == "perplexity" else ""
    title = f"{what[:1].upper()}{what[1:]} gap to {runs[0].name}"
    name = f"{what.replace(' ', '_')}_gap"
    return Drawing(name, title, caption, style.finish(figure, [axes]) if drawn else None)


def _compared(runs: Sequence[Run]) -> tuple[str, str, list[Points]]:
    """Return what runs are compared by, of which data, and its curves."""
    shared = [name for name in runs[0].metrics() if all(name in run.metrics() for run in runs)]
    if shared and not all(run.language_model for run in runs):
        return named(shared[0]), "validation", [run.metrics()[shared[0]] for run in runs]
    validated = all(run.curve("eval_loss") for run in runs)
    curves = [run.curve("eval_loss" if validated else "loss") for run in runs]
    source = "validation" if validated else "training"
    if not all(run.language_model for run in runs):
        return "loss", source, curves
    return "perplexity", source, [[(step, perplexity(loss)) for step, loss in curve] for curve in curves]


def gauges(runs: Sequence[Run]) -> Drawing:
    """Draw the gauges that the methods declare, a panel each: means over matrices at every log."""
    declared = {name: help for run in reversed(runs) for name, help in run.gauges.items()}
    found = {name: [run.curve(f"lowrank/{name}") for run in runs] for name in declared}
    found = {name: curves for name, curves in found.items() if any(curves)}
    figure, panels = style.canvas(max(1, len(found)))
    for axes, (name, curves) in zip(panels, found.items(), strict=False):
        for i, (run, points) in enumerate(zip(runs, curves, strict=True)):
            if points:
                axes.plot(*style.thin(points), **style.look(i), label=style.label(run.name))
        axes.set(title=named(name))
    panels[-1].set_xlabel("training step")
    said = "; ".join(f"{named(name)}: {declared[name]}" for name in found)
    caption = f"Means over matrices, as the method's parts declare them. {said}."
    return Drawing("gauges", "Gauges of the methods", caption, style.finish(figure, panels) if found else None)


def update_rank(runs: Sequence[Run]) -> Drawing:
    """Draw the effective rank of the update at checkpoints."""
    figure, (axes,) = style.canvas()
    for i, run in enumerate(runs):
        if points := run.curve("lowrank/update_rank"):
            axes.plot(*style.thin(points), **style.look(i), label=style.label(run.name))
    drawn = bool(axes.lines)
    axes.set(xlabel="training step of the checkpoint", ylabel="effective rank")
    axes.set_ylim(bottom=0)
    caption = "(Σσ²)²/Σσ⁴ of what the matrices changed by since the checkpoint before; mean over matrices, estimated."
    title = "Effective rank of the update"
    return Drawing("update_rank", title, caption, style.finish(figure, [axes]) if drawn else None)
