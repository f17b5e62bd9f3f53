"""`hf-lowrank methods`: which there are. A list imports no torch; state, limits and options do."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase
from typing import Annotated, Any

import typer
from rich.markup import escape

from hf_lowrank.cli.printing import AsJson, show, table
from hf_lowrank.methods import registry, resolve, tables
from hf_lowrank.methods.table import METHODS


def list_methods(
    pattern: Annotated[
        str, typer.Argument(help="Part of a name, or a pattern with * and ?. Default: all.", show_default=False)
    ] = "*",
    details: Annotated[
        bool, typer.Option("--details", help="Everything about each method, one after the other.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Also state and limits, and every option by the part that has it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the optimizers: subspace x moments x reconstruction, and the paper.

    Every name also exists with [bold]_8bit[/bold], [bold]_layerwise[/bold] and [bold]_8bit_layerwise[/bold]. State is
    counted in numbers per m x n matrix (m <= n) at rank r.
    """
    rows = {name: _described(name, details=details, full=full or details) for name in _matching(pattern)}
    if as_json:
        print(json.dumps([{"name": name, **row} for name, row in rows.items()], indent=2))
    elif details:
        for name, row in rows.items():
            _print_details(name, row)
    else:
        heads = ("what it is", "parts", *(("state", "cannot") if full else ()), "paper")
        shown = table("name", *heads, no_wrap=("name", "state"))
        for name, row in rows.items():
            row["what it is"], row["parts"] = row["summary"], " x ".join(row[kind] for kind in registry.KINDS)
            shown.add_row(name, *(row[head] for head in heads))
        show(shown)
        if full:
            _print_options(list(rows))


def _print_details(name: str, row: dict[str, Any]) -> None:
    """Print one method: what it is, its parts and limits, then its options by the part that has them."""
    show(f"[bold]{name}[/bold]: {escape(row['summary'])}")
    shown = {key: row[key] for key in (*registry.KINDS, "state", "paper", "cannot")}
    show("\n".join(f"  {key:16} {escape(value)}" for key, value in shown.items()))
    _print_options([name])


def _print_options(names: list[str]) -> None:
    """Print the options of some methods, each group of them below the part that has it."""
    for group in tables.option_groups(names):
        show(f"\n[bold]{escape(group.title)}[/bold]")
        shown = table("option", "default", "valid", "meaning", no_wrap=("option",))
        for row in group.rows:
            shown.add_row(row.name, row.default.replace("`", ""), row.valid, escape(row.help))
        show(shown)
    show("")


def _matching(pattern: str) -> list[str]:
    wild = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    matching = {resolve.split(name)[0] for name in resolve.names() if fnmatchcase(name, wild)}  # endings as well
    if found := [name for name in METHODS if name in matching]:
        return found
    return [resolve.split(pattern)[0]]  # a name with an ending, or an error that names the nearest


def _described(name: str, *, details: bool, full: bool) -> dict[str, Any]:
    """Return what is known of a method; state, limits and options import torch."""
    method = METHODS[name]
    row: dict[str, Any] = {"summary": method.summary, **tables.named_parts(name), "paper": method.paper}
    if full:
        config = resolve.Config.of(name, {})
        row |= {"state": tables.state(config), "cannot": tables.limits(config)}
        row |= {"options": tables.options_of(name)} if details else {}
    return row
