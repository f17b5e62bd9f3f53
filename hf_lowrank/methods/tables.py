"""The methods and their options as Markdown tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_lowrank.methods import options
from hf_lowrank.methods.formula import state_formula
from hf_lowrank.methods.registry import KINDS, prototype
from hf_lowrank.methods.resolve import Config, LowRankOptions, SharedOptions, complete
from hf_lowrank.methods.table import METHODS as METHODS
from hf_lowrank.methods.table import Method as Method


if TYPE_CHECKING:
    pass


def table() -> str:
    """Return the methods as a Markdown table, as it stands in the README."""
    head = ("name", "subspace x moments x reconstruction", "state per m x n matrix", "what it is", "paper", "cannot")
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in METHODS.items():
        config = Config.of(name, {})
        made = (getattr(row, kind) for kind in KINDS)
        shown = " x ".join(part if isinstance(part, str) else type(part).__name__ for part in made)
        rows.append(
            f"| `{name}` | {shown} | {state_formula(config)} | {row.summary} | {row.paper} | {limits(config)} |"
        )
    return "\n".join(rows)


def limits(config: Config) -> str:
    """Return what a method cannot do, in a line."""
    in_hook = ["layerwise: no accumulation, no max_grad_norm"] if config.parts.needs_gradient else []
    return "; ".join([*in_hook, *filter(None, [METHODS[config.method].limits])]) or "-"


def options_table() -> str:
    """Return every option as a Markdown table, as it stands in the README: where defaults differ, with the methods."""
    found: dict[str, dict[Any, list[str]]] = {}
    helps: dict[str, str] = {}
    for name, row in METHODS.items():
        made = [prototype(kind, getattr(row, kind)) for kind in KINDS]
        schema = options.schema(SharedOptions, LowRankOptions, *made)
        for key, value in complete(name, {}).items():
            if key in schema:
                found.setdefault(key, {}).setdefault(value, []).append(name)
                option = options.of(schema[key])
                valid = option.expected.removeprefix("one of ") if option.expected.startswith("one of") else ""
                helps.setdefault(key, option.help + (f" ({valid})" if valid else ""))
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
