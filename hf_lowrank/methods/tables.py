"""The methods and their options as tables: what there is, how much state, which option belongs to which part."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from hf_lowrank.methods import options
from hf_lowrank.methods.common import LowRankOptions, ReplicaOptions, SharedOptions
from hf_lowrank.methods.dense import SplitOptions
from hf_lowrank.methods.registry import KINDS
from hf_lowrank.methods.resolve import Config, part_choices
from hf_lowrank.methods.table import METHODS


SHARED, MATRICES, CHOICES = "Every method", "Every method, for its matrices", "Which parts"
SPLIT = "Every method, for what has no subspace"
REPLICAS = "Every method, under DistributedDataParallel"
"""Titles of the groups of options that belong to no part."""

SHOWN = 8
"""So many methods are named above the options that they have; more are counted."""

Owner = tuple[int, str]
"""Whose an option is: a place in the order of the groups, and the name of a part or the title of a group."""

Declared = tuple[str, options.Option]
"""An option's name and its declaration: parts may have the same name for another choice of values."""


@dataclass(frozen=True)
class OptionRow:
    """An option as a table shows it.

    Attributes:
        name: of the option.
        default: as it is written in `--optim_args`; where methods differ, with their names.
        valid: what is valid, in words.
        help: what it means.
    """

    name: str
    default: str
    valid: str
    help: str


@dataclass(frozen=True)
class OptionGroup:
    """The options that the same parts have.

    Attributes:
        title: such as "Every method" or "Subspace golore".
        methods: the names of the methods that have them.
        rows: the options.
    """

    title: str
    methods: tuple[str, ...]
    rows: tuple[OptionRow, ...]


def named_parts(name: str) -> dict[str, str]:
    """Return the names of a method's parts by their kinds: "subspace", "moments", "reconstruction". Needs no torch."""
    row = METHODS[name]
    return {kind: _part_name(getattr(row, kind)) for kind in KINDS}


def _part_name(part: Any) -> str:
    """Return the name of a part, which a row of the table may hold itself."""
    if isinstance(part, str):
        return part
    return next((key for key, made in type(part).registry.items() if made is type(part)), type(part).__name__)


def limits(config: Config) -> str:
    """Return what a method cannot do, in a line."""
    in_hook = ["no reduce_projected, no layerwise under DDP"] if config.parts.needs_gradient else []
    return "; ".join([*in_hook, *filter(None, [METHODS[config.method].limits])]) or "-"


def state(config: Config) -> str:
    """Return the numbers of state per m x n matrix, such as "mr + 2nr"."""
    from hf_lowrank.methods.formula import state_formula  # needs torch, which a list of names does without

    return state_formula(config)


def table() -> str:
    """Return the methods as a Markdown table."""
    head = ("name", "subspace x moments x reconstruction", "state per m x n matrix", "what it is", "paper", "cannot")
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in METHODS.items():
        config, shown = Config.of(name, {}), " x ".join(named_parts(name).values())
        cells = [f"`{name}`", shown, state(config), row.summary, row.paper, limits(config)]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def options_tables(names: Iterable[str] = METHODS) -> str:
    """Return every option as Markdown: a heading and a table for each group of `option_groups`."""
    return "\n\n".join(
        f"### {group.title}\n\n{_used_by(group)}{options_table(group)}" for group in option_groups(names)
    )


def _used_by(group: OptionGroup) -> str:
    """Return a line with the methods that have the options of a group, where not all have them."""
    if group.title in (SHARED, MATRICES, SPLIT, REPLICAS):
        return ""
    shown = [f"`{name}`" for name in group.methods[:SHOWN]]
    rest = [f"{len(group.methods) - SHOWN} more with such a part"] if len(group.methods) > SHOWN else []
    return f"In {', '.join(shown + rest)}.\n\n"


def options_table(group: OptionGroup) -> str:
    """Return the options of one group as a Markdown table."""
    rows = ["| option | default | valid | meaning |", "|---" * 4 + "|"]
    for row in group.rows:
        cells = (cell.replace("|", "\\|") for cell in (row.default, row.valid, row.help))
        rows.append(f"| `{row.name}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def option_groups(names: Iterable[str] = METHODS) -> list[OptionGroup]:
    """Return the options of some methods, those of the same parts together.

    Args:
        names: rows of the table.
    """
    values: dict[Declared, dict[str, Any]] = defaultdict(dict)  # defaults by method
    owners: dict[Declared, set[Owner]] = defaultdict(set)
    for name in names:
        known = options_of(name)
        for owner, key, option in _declared(Config.of(name, {})):
            if key in known:
                values[key, option][name] = known[key]
                owners[key, option].add(owner)
    grouped: dict[tuple[Owner, ...], list[Declared]] = defaultdict(list)
    for declared, of in owners.items():
        grouped[tuple(sorted(of))].append(declared)
    return [
        OptionGroup(
            _title(of),
            tuple(dict.fromkeys(name for declared in found for name in values[declared])),
            tuple(OptionRow(key, _defaults(values[key, o]), o.expected, o.help) for key, o in found),
        )
        for of, found in sorted(grouped.items(), key=lambda item: item[0])
    ]


def options_of(name: str) -> dict[str, Any]:
    """Return every option that a method takes for a model, with its default."""
    config = Config.of(name, {}, model=True)
    return {**config.options, **asdict(config.split), **asdict(ReplicaOptions())}


def _declared(config: Config) -> Iterator[tuple[Owner, str, options.Option]]:
    """Yield (whose it is, name, declaration) of a method's options."""
    owners: dict[Owner, Any] = {(0, MATRICES): LowRankOptions, (len(KINDS) + 1, SHARED): SharedOptions}
    owners |= {(len(KINDS) + 2, SPLIT): SplitOptions, (len(KINDS) + 3, REPLICAS): ReplicaOptions}
    for place, kind in enumerate(KINDS, start=1):
        part = getattr(config.parts, kind)
        owners[place, _part_name(part)] = part
    for owner, made in owners.items():
        yield from ((owner, item.name, options.of(item)) for item in fields(made))
    if METHODS[config.method].free:
        yield from (((-1, CHOICES), key, options.of(item)) for key, item in part_choices().items())


def _title(owners: Iterable[Owner]) -> str:
    """Return "Subspaces dominant, i3s" for these parts, say."""
    names: dict[int, list[str]] = defaultdict(list)
    for place, name in owners:
        names[place].append(name)
    kinds = {place: dict(enumerate(KINDS, start=1)).get(place, "") for place in names}
    plural = {place: kind.removesuffix("s") + "s" for place, kind in kinds.items() if kind and len(names[place]) > 1}
    title = "; ".join(f"{(kinds | plural)[place]} {', '.join(found)}".strip() for place, found in names.items())
    return title[0].upper() + title[1:]


def _defaults(values: dict[str, Any]) -> str:
    """Return the usual default of an option, and the others with the methods that have them."""
    methods: dict[Any, list[str]] = defaultdict(list)
    for name, value in values.items():
        methods[value].append(name)
    usual = max(methods, key=lambda value: len(methods[value]))
    others = (
        f"{_text(value)} for {', '.join(f'`{name}`' for name in names)}"
        for value, names in methods.items()
        if value != usual
    )
    return "; ".join([_text(usual), *others])


def _text(value: Any) -> str:
    """Return a value as it is written in `--optim_args`."""
    if value is None:
        return "-"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
