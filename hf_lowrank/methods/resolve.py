"""How a name with options becomes a method: resolved once, to a frozen Config that is handed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hf_lowrank.methods import options as opt
from hf_lowrank.methods.combination import Parts, check_together
from hf_lowrank.methods.common import OFFLOAD, LowRankOptions, SharedOptions
from hf_lowrank.methods.dense import MIXED, SAME, DenseOptions, SplitOptions
from hf_lowrank.methods.registry import KINDS, Gauge, classes, prototype
from hf_lowrank.methods.table import METHODS, Method


if TYPE_CHECKING:
    from hf_lowrank.methods.parts import Moments


SUFFIXES: dict[str, dict[str, Any]] = {
    "_8bit": {"state_format": "8bit", "dense_state_format": "8bit"},
    "_layerwise": {"layerwise": True},
}
"""What the endings of a name stand for; they may be combined in this order."""


def names() -> list[str]:
    """Return every valid name: the rows of the table, each also with `_8bit`, `_layerwise` and `_8bit_layerwise`."""
    return list(
        dict.fromkeys(row + ending for row in METHODS for ending in ("", "_8bit", "_layerwise", "_8bit_layerwise"))
    )


def split(name: str) -> tuple[str, dict[str, Any]]:
    """Return the row of a name and the options that its endings stand for.

    Raises:
        ValueError: if there is no such method; the nearest name is suggested.
    """
    if not isinstance(name, str):
        raise ValueError(f"method must be a name such as 'galore_i3s_adamw', got {name!r}")
    row, given = name, dict[str, Any]()
    for ending in reversed(SUFFIXES):
        if row not in METHODS and row.endswith(ending):
            row, given = row.removesuffix(ending), {**SUFFIXES[ending], **given}
    if row not in METHODS:
        raise ValueError(f"unknown method {name!r}{opt.suggest(name, METHODS)} (each also with _8bit and _layerwise)")
    return row, given


def with_endings(name: str, options: Mapping[str, Any]) -> str:
    """Return a name with the endings that stand for options, whichever it has."""
    row = split(name)[0]
    usual, options = METHODS[row].defaults, {**options, "layerwise": bool(options.get("layerwise"))}  # offload, too
    held = [
        ending
        for ending, given in SUFFIXES.items()
        if all(options.get(key) == value and usual.get(key) != value for key, value in given.items())
    ]
    return row + "".join(held)


@dataclass(frozen=True)
class Config:
    """A method with all of its options, typed and checked.

    Attributes:
        method: the row of the table.
        options: every option of a group of matrices, or of a group of dense parameters.
        parts: what the options are filled into.
        low_rank: whether this is for matrices.
        split: how dense parameters are told apart where the options are those of a whole model.
    """

    method: str
    options: Mapping[str, Any]
    parts: Parts
    low_rank: bool = True
    split: SplitOptions = SplitOptions()

    @classmethod
    def of(
        cls,
        name: str,
        given: Mapping[str, Any],
        *,
        low_rank: bool = True,
        model: bool = False,
        facts: Mapping[str, Any] | None = None,
    ) -> Config:
        """Resolve a name and the options that the user set.

        Args:
            name: a valid name.
            given: options as values or text.
            low_rank: False for a group of dense parameters.
            model: whether these are the options of a whole model, so that those of its split are among them.
            facts: what is known of the model and the run, for the options that are such a fact and are not given.

        Raises:
            ValueError: for an option that does not exist (or does not apply) and for a value that is not valid.
        """
        row, implied = split(name)
        what, given = f"optimizer {name}", {**implied, **given}
        kinds, chosen = _chosen_parts(row, given, what)
        schema = _schema(chosen, low_rank)
        valid = {**schema, **kinds, **(splitting := opt.schema(SplitOptions) if model else {})}
        for key in given:
            if key not in valid:
                opt.parse(key, given[key], valid, what=what)  # says what there is
        values = {key: given[key] for key in schema if key in given}
        facts = facts or {}
        known = {key: facts[fact] for key, item in schema.items() if (fact := opt.of(item).fact) in facts}
        defaults = {**_defaults(METHODS[row], chosen, schema), **known}
        options = {key: opt.parse(key, values.get(key, defaults[key]), schema, what=what) for key in schema}
        named = {kind: given.get(kind, getattr(METHODS[row], kind)) for kind in kinds}
        try:
            parts = _filled(chosen, options)
            if low_rank:
                check_together(parts, options)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        wanted = {**METHODS[row].defaults, **given}
        apart = {key: opt.parse(key, wanted[key], splitting, what=what) for key in splitting if key in wanted}
        return cls(row, MappingProxyType({**named, **options}), parts, low_rank, SplitOptions(**apart))

    def with_(self, **options: Any) -> Config:
        """Return the same with other values of options that are no part's, such as the seed."""
        schema = opt.schema(SharedOptions)
        values = {
            key: opt.parse(key, value, schema, what=f"optimizer {self.method}") for key, value in options.items()
        }
        return replace(self, options=MappingProxyType({**self.options, **values}))

    def dense(self, kind: str = MIXED) -> Config:
        """Return the same for a group of dense parameters of one kind."""
        known = {**self.options, "dense": self.split.rule(kind), "kind": kind, "in_hook": self.parts.needs_gradient}
        own = option_names(self.method, known, low_rank=False)
        given = {key: known[key] for key in own if key in known}
        return replace(Config.of(self.method, given, low_rank=False), split=self.split)

    @property
    def dense_rule(self) -> Moments:
        """The rule of what is stepped without a subspace."""
        chosen = self.options.get("dense")
        if chosen is None:
            return self.parts.moments
        rule: Moments = self.parts.moments.dense if chosen == SAME else prototype("moments", chosen)
        return rule

    @property
    def by_matrix(self) -> bool:
        """Whether this is for matrices that are stepped one by one; else whole groups are, as dense parameters."""
        return self.low_rank and not self.parts.direct

    @property
    def offloads(self) -> bool:
        """Whether gradients wait in host memory."""
        return bool(self.options["layerwise"] == OFFLOAD)

    @property
    def hooked(self) -> bool:
        """Whether the layerwise mode takes the gradients of these parameters during backward."""
        if self.low_rank or self.offloads or not self.options["layerwise"]:
            return bool(self.options["layerwise"])
        chosen = self.options["in_hook"]
        return self.parts.needs_gradient if chosen == "auto" else bool(chosen)

    @property
    def facts(self) -> dict[str, str]:
        """The options that are a fact of the model or the run, and which."""
        found = _schema(_chosen_parts(self.method, self.options, self.method)[1], self.low_rank)
        return {key: fact for key, item in found.items() if (fact := opt.of(item).fact)}

    @property
    def gauges(self) -> dict[str, Gauge]:
        """What the parts leave for the log."""
        parts = self.parts
        return {**parts.subspace.gauges, **parts.moments.gauges, **parts.reconstruction.gauges}


def option_names(method: str, given: Mapping[str, Any], *, low_rank: bool) -> list[str]:
    """Return the names of the options that a group has, those that choose its parts among them.

    Args:
        method: a key of METHODS.
        given: what chooses its parts, for instance a group.
        low_rank: whether it is a group of matrices.
    """
    kinds, chosen = _chosen_parts(method, given, f"optimizer {method}")
    return [*kinds, *_schema(chosen, low_rank)]


def complete(name: str, given: Mapping[str, Any], *, low_rank: bool = True) -> dict[str, Any]:
    """Return every option of a group, typed, with defaults where `given` has none. See `Config.of`."""
    return dict(Config.of(name, given, low_rank=low_rank).options)


def parts(name: str, options: Mapping[str, Any]) -> Parts:
    """Build the parts of a method from typed options; keys that belong to no part are left to others.

    Args:
        name: a key of METHODS.
        options: typed values, for instance a parameter group.
    """
    method = METHODS[name]
    made = [prototype(kind, (method.free and options.get(kind)) or getattr(method, kind)) for kind in KINDS]
    return _filled(Parts(*made), options)


def dense_options() -> set[str]:
    """Return the names of the options that dense parameters of any method have: the shared ones, and of moments."""
    owners: list[Any] = [SharedOptions, *classes("moments").values()]
    return {*KINDS, *(item.name for owner in owners for item in fields(owner))}


def _chosen_parts(row: str, given: Mapping[str, Any], what: str) -> tuple[dict[str, Field[Any]], Parts]:
    """Return the options that choose parts by name (of the row `lowrank`), and the parts with their defaults."""
    method = METHODS[row]
    kinds = part_choices() if method.free else {}
    made = []
    for kind in KINDS:
        part = getattr(method, kind)
        if kind in kinds:
            part = opt.parse(kind, given.get(kind, part), kinds, what=what)
        made.append(prototype(kind, part))
    return kinds, Parts(*made)


def part_choices() -> dict[str, Field[Any]]:
    """Return the options of `lowrank`: its parts by name."""
    free = {kind: sorted(k for k, part in classes(kind).items() if part.composable) for kind in KINDS}
    return {kind: opt.choice(*names, help=f"which {kind}") for kind, names in free.items()}


def _schema(chosen: Parts, low_rank: bool) -> dict[str, Field[Any]]:
    """Return the options of a group by name."""
    subspace, moments, reconstruction = chosen.subspace, chosen.moments, chosen.reconstruction
    if not low_rank:
        found = opt.schema(SharedOptions, DenseOptions, moments)
        return {key: item for key, item in found.items() if key not in moments.dense.without}
    found = opt.schema(SharedOptions, LowRankOptions, moments, subspace, reconstruction)
    without = {*subspace.without, *moments.without, *reconstruction.without}
    return {key: item for key, item in found.items() if key not in without}


def _defaults(method: Method, chosen: Parts, schema: Mapping[str, Field[Any]]) -> dict[str, Any]:
    """Return the default of every option: of its field, of the parts as the row has them, of the row."""
    on_refresh = chosen.subspace.on_refresh
    if on_refresh not in chosen.moments.transports:  # LDAdam's rule, say, with momentum alone
        on_refresh = "rotate" if "rotate" in chosen.moments.transports else "keep"
    made: tuple[Any, ...] = (chosen.moments, chosen.subspace, chosen.reconstruction)
    own = {item.name: getattr(part, item.name) for part in made for item in fields(part)}
    common = {key: item.default for key, item in schema.items()}
    return {**common, **own, "on_refresh": on_refresh, **method.defaults}


def _filled(chosen: Parts, options: Mapping[str, Any]) -> Parts:
    """Return the parts with the options that are theirs."""
    parts: tuple[Any, ...] = (chosen.subspace, chosen.moments, chosen.reconstruction)
    given = ({item.name: options[item.name] for item in fields(part) if item.name in options} for part in parts)
    made = [replace(part, **own) for part, own in zip(parts, given, strict=True)]
    if options.get("proj_type") == "full":
        from hf_lowrank.methods.subspaces.two_sided import BothSides

        made[0] = BothSides(made[0])
    if options.get("stable_spam"):
        from hf_lowrank.methods.reconstructions.stable_spam import StableSpam

        made[2] = StableSpam(made[2])
    return Parts(*made)
