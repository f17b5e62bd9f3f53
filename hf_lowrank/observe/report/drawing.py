"""One drawing of the report, before it is on the page."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure as Canvas


@dataclass(frozen=True)
class Drawing:
    """A figure before it is written; `canvas` is None where the runs do not have what it shows.

    Attributes:
        name: of its PNG file.
        title: what it shows.
        caption: how to read it.
        canvas: the drawing.
    """

    name: str
    title: str
    caption: str
    canvas: Canvas | None
