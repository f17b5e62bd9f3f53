"""How recipes show results: tables in Markdown, and the colours of figures."""

from __future__ import annotations

from collections.abc import Iterable


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's: told apart by colour-blind eyes too."""

MARKERS = "osD^vPX"


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return an aligned Markdown table; columns are right-aligned except the first."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, rule)
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in lines
    )
