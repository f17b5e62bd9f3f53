"""The methods and their options as Markdown tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_lowrank.methods import options
from hf_lowrank.methods.registry import KINDS, _prototype
from hf_lowrank.methods.resolve import LowRankOptions, SharedOptions, complete
from hf_lowrank.methods.table import METHODS as METHODS
from hf_lowrank.methods.table import Method as Method


if TYPE_CHECKING:
    pass


def table() -> str:
    """Return the methods as a Markdown table, as it stands in the README."""
    head = ("name", "subspace x moments x reconstruction", "state per m x n matrix", "what it is", "paper", "cannot")
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in METHODS.items():
        made = (getattr(row, kind) for kind in KINDS)
        shown = " x ".join(part if isinstance(part, str) else type(part).__name__ for part in made)
        rows.append(f"| `{name}` | {shown} | {row.state} | {row.summary} | {row.paper} | {row.limits or '-'} |")
    return "\n".join(rows)


def options_table() -> str:
    """Return every option as a Markdown table, as it stands in the README: where defaults differ, with the methods."""
    found: dict[str, dict[Any, list[str]]] = {}
    helps: dict[str, str] = {}
    for name, row in METHODS.items():
        made = [_prototype(kind, getattr(row, kind)) for kind in KINDS]
        schema = options.schema(SharedOptions, LowRankOptions, *made)
        for key, value in complete(name, {}).items():
            if key in schema:
                found.setdefault(key, {}).setdefault(value, []).append(name)
                meta = schema[key].metadata
                valid = meta["expected"].removeprefix("one of ") if meta["expected"].startswith("one of") else ""
                helps.setdefault(key, meta["help"] + (f" ({valid})" if valid else ""))
    rows = ["| option | default | meaning |", "|---" * 3 + "|"]
    for key, values in found.items():
        usual = max(values, key=lambda value: len(values[value]))
        others = [
            f"{_text(value)} for {', '.join(f'`{name}`' for name in names)}"
            for value, names in values.items()
            if value != usual
        ]
        rows.append(f"| `{key}` | {'; '.join([_text(usual), *others])} | {helps[key]} |")
    return "\n".join(rows)


def _text(value: Any) -> str:
    """Return a value as it is written in `--optim_args`."""
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
