"""How figures look: Okabe and Ito's colours with a marker and a dash each, text in the colour of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#8C6D31")
"""Okabe and Ito's, told apart by colour-blind eyes; grey and brown in place of black and yellow, which vanish on a
dark or a white page."""

MARKERS = "osD^vPX*"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)), (0, (3, 3)))
HATCHES = ("", "//", "..", "xx")
INK = "#1b1b1f"
"""Text and axes: on the page replaced by the page's own colour, light or dark."""

POINTS = 800
"""Most points of one line."""

_SETTINGS = {
    "font.size": 11.0,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "legend.fontsize": 10.0,
    "svg.fonttype": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}


@contextmanager
def settings() -> Iterator[None]:
    """Draw with our settings, and leave the user's as they are."""
    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type]
        yield


def canvas(panels: int = 1) -> tuple[Canvas, list[Any]]:
    """Return a figure that a phone can show, with panels above one another."""
    figure = Canvas(figsize=(4.8, 1.9 + 1.6 * panels), layout="constrained")
    return figure, list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])


def look(i: int) -> dict[str, Any]:
    """Return colour, dash and marker of line `i`, each of which tells eight lines apart, and all together 64."""
    j = (i + i // 8) % 8
    return {"color": COLOURS[i % 8], "linestyle": DASHES[j], "marker": MARKERS[j], "markevery": 0.12}


def label(text: str) -> str:
    """Return text that matplotlib shows as it is: a legend leaves out what begins with _, and $ begins a formula."""
    return ("\N{ZERO WIDTH SPACE}" if text.startswith("_") else "") + text.replace("$", r"\$")


def thin(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return x and y of at most POINTS points, evenly chosen, the last among them."""
    stride = -(-len(points) // POINTS) or 1
    kept = points[::-1][::stride][::-1]
    return [x for x, _ in kept], [y for _, y in kept]


def log_scale(axes: Any, which: str = "y") -> None:
    """Make the x or y axis logarithmic, with plain numbers at its ticks even where it spans less than a decade."""
    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if high / low < 20:
        axis.set_major_locator(MaxNLocator(nbins=6))
    axis.set_minor_locator(NullLocator())


def finish(figure: Canvas, axes: list[Any], *, columns: int = 2, whole_steps: bool = True) -> Canvas:
    """Add the legend below; number steps by integers."""
    handles, labels = axes[0].get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(handles)))
    if whole_steps:
        axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return figure


def save(figure: Canvas, name: str, folder: Path) -> str:
    """Write NAME.png on white, and return the figure as SVG for the page, in the page's colours."""
    figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
    figure.set_layout_engine("none")  # it has been laid out
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids that no other figure on the page has
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", text.getvalue(), flags=re.DOTALL)
    svg = re.sub(r'\bid="|url\(#|href="#', lambda found: f"{found[0]}{name}-", svg)
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ([^>]*?)height="[^"]*" width="[^"]*"', r"<svg \1\2", svg
    )
