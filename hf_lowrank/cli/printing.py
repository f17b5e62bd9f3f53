"""Tables and text on the console."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def table(*columns: str, right: tuple[int, ...] = (), no_wrap: tuple[str, ...] = ()) -> Table:
    """Return a table without lines; `right` are the columns of numbers, `no_wrap` those that stay in one line."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        justify = "right" if i in right else "left"
        made.add_column(column, justify=justify, no_wrap=column in no_wrap, overflow="fold")  # type: ignore[arg-type]
    return made


def show(what: Any) -> None:
    """Print to the terminal's width; into a pipe or file without one."""
    width = None if sys.stdout.isatty() else 200
    Console(soft_wrap=isinstance(what, str), highlight=False, width=width).print(what)
