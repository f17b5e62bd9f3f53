"""The figure of state_and_loss.py: a point per name, bars over seeds, names beside the points."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import NamedTuple

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.text import Annotation, Text  # noqa: E402
from matplotlib.transforms import Bbox  # noqa: E402


COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
"""Okabe and Ito's, told apart by colour-blind eyes too, and a grey."""

MARKERS = "*osD^vPX"
PLACES = [(x * side, y * up) for y in range(0, 130, 13) for x in (10, 26) for up in (1, -1) for side in (1, -1)]
"""Where a name may begin (or end), from its point, in points of 1/72 inch; the first that is free is taken."""


class Point(NamedTuple):
    """One name: MiB of optimizer state, and the losses of its seeds."""

    name: str
    state: float
    losses: tuple[float, ...]


def draw(points: list[Point], file: Path, *, title: str) -> None:
    """Draw state against loss into a PNG file."""
    figure, _ = drawn(points, title=title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def drawn(points: list[Point], *, title: str) -> tuple[plt.Figure, plt.Axes]:
    """Return the figure and its axes."""
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for point, colour, marker in zip(points, COLOURS, MARKERS, strict=False):
        middle = mean(point.losses)
        bars = [[middle - min(point.losses)], [max(point.losses) - middle]]
        size = 13 if marker == "*" else 8
        axes.errorbar(point.state, middle, bars, fmt=marker, markersize=size, color=colour, capsize=4, elinewidth=1.5)
    axes.set(
        xlabel="optimizer state of the whole model, embeddings and head included (MiB)",
        ylabel="held-out loss (nats per token)",
    )
    axes.set_title(title, fontsize=10)
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.draw_without_rendering()  # places are taken in pixels: the axes must have their size
    name_(axes, points)
    return figure, axes


def name_(axes: plt.Axes, points: list[Point]) -> None:
    """Write the names beside their points, none over another, over a bar or over the edge."""
    taken = [_box(axes, point) for point in points]
    for point, colour in zip(points, COLOURS, strict=False):
        for x, y in PLACES:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 4} if abs(y) > 13 else None
            text = axes.annotate(
                point.name,
                (point.state, mean(point.losses)),
                (x, y),
                textcoords="offset points",
                horizontalalignment="left" if x > 0 else "right",
                verticalalignment="center",
                color=colour,
                fontsize=9,
                arrowprops=line,
            )
            box = extent(text)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0
            if inside and box.y1 <= axes.bbox.y1 and not box.count_overlaps(taken):
                break
            if (x, y) != PLACES[-1]:
                text.remove()
        taken.append(box)


def extent(text: Annotation) -> Bbox:
    """Return what a name covers, in pixels, without the line to its point."""
    text.update_positions(text.figure.canvas.get_renderer())
    return Text.get_window_extent(text)


def _box(axes: plt.Axes, point: Point) -> Bbox:
    """Return what a point and its bars cover, in pixels, with a little air."""
    low, high = (axes.transData.transform((point.state, edge(point.losses))) for edge in (min, max))
    return Bbox([low - 9, high + 9])
