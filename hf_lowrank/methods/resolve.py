"""How a name with options becomes parts; the names and options as tables. Reading those needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hf_lowrank.methods import options
from hf_lowrank.methods.registry import KINDS, TRANSPORTS, _prototype, _registry
from hf_lowrank.methods.table import METHODS as METHODS
from hf_lowrank.methods.table import Method as Method


if TYPE_CHECKING:
    from hf_lowrank.methods.parts import Moments, Reconstruction, Subspace


@dataclass(frozen=True)
class SharedOptions:
    """Options of every group."""

    seed: int = options.integer(0, minimum=0, help="seed of the private generators")
    correct_bias: bool = options.flag(True, help="Adam's bias correction")
    stochastic_rounding: bool = options.flag(
        True, help="write bf16/fp16 weights by stochastic rounding, else to nearest"
    )
    state_format: str = options.choice("fp32", "8bit", "4bit", help="number format of the moments of matrices")
    basis_format: str = options.choice("fp32", "bf16", "8bit", "4bit", help="number format of the bases")
    dense_state_format: str = options.choice("fp32", "8bit", help="number format of the moments of dense parameters")
    layerwise: bool = options.flag(False, help="free every gradient during backward; see LowRankOptimizer.train")
    max_grad_norm: float = options.number(0.0, help="clip by the global norm of the projected gradients; 0: off")


@dataclass(frozen=True)
class LowRankOptions:
    """Options of every group of matrices."""

    rank: float = options.rank(128, help="dimension of the subspace; clamped to the matrix's short side")
    update_proj_gap: int = options.integer(200, minimum=1, help="steps between refreshes of the subspace")
    scale: float = options.number(0.25, above=0.0, below=1e9, help="factor alpha on the low-rank update")
    proj_type: str = options.choice(
        "std",
        "paper",
        "reverse_std",
        "left",
        "right",
        "full",
        help="which side of the weight is projected; full: both",
    )
    on_refresh: str = options.choice(*TRANSPORTS, help="what happens to the moments at a refresh")
    stagger: bool = options.flag(False, help="spread the refreshes of the matrices evenly over the interval")


@dataclass(frozen=True)
class Parts:
    """A method with its options filled in; its repr is the configuration."""

    subspace: Subspace
    moments: Moments
    reconstruction: Reconstruction

    @property
    def needs_gradient(self) -> bool:
        """Whether the gradient must live until the weight is written, so that layerwise updates in the hook."""
        return self.subspace.needs_gradient or self.reconstruction.needs_gradient


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
    row, given = name, dict[str, Any]()
    for ending in reversed(SUFFIXES):
        if row not in METHODS and row.endswith(ending):
            row, given = row.removesuffix(ending), {**SUFFIXES[ending], **given}
    if row not in METHODS:
        raise ValueError(
            f"unknown method {name!r}{options.suggest(name, METHODS)} (each also with _8bit and _layerwise)"
        )
    return row, given


def parts(name: str, options: Mapping[str, Any]) -> Parts:
    """Build the parts of a method from options; keys that belong to no part are left to others.

    Args:
        name: a key of METHODS.
        options: typed values, for instance a parameter group.
    """
    method = METHODS[name]
    chosen = [options.get(kind) or getattr(method, kind) if method.free else getattr(method, kind) for kind in KINDS]
    made = [_prototype(kind, part) for kind, part in zip(KINDS, chosen, strict=True)]
    given = tuple((f.name, options[f.name]) for part in made for f in fields(part) if f.name in options)
    return _fill(tuple(made), given, options.get("proj_type") == "full")


def complete(name: str, given: Mapping[str, Any], *, low_rank: bool = True) -> dict[str, Any]:
    """Return every option of a group, typed, with defaults where `given` has none.

    Args:
        name: a valid name.
        given: the options that the user set, as values or text.
        low_rank: False for a group of dense parameters.

    Raises:
        ValueError: for an option that does not exist (or does not apply) and for a value that is not valid.
    """
    row, implied = split(name)
    method, what, given = METHODS[row], f"optimizer {name}", {**implied, **given}
    result: dict[str, Any] = {}
    owners: list[Any] = [SharedOptions, *([LowRankOptions] if low_rank else [])]
    if method.free:
        choices = _free_schema()
        result = {k: options.parse(k, given.get(k, getattr(method, k)), choices, what=what) for k in choices}
    built = parts(row, result)
    owners += [built.moments, *([built.subspace, built.reconstruction] if low_rank else [])]
    schema = {k: v for k, v in options.schema(*owners).items() if not (low_rank and k in built.subspace.without)}
    valid = {**schema, **(_free_schema() if method.free else {})}
    for key in given:
        options.parse(key, given[key], valid, what=what)
    layerwise = options.parse("layerwise", given.get("layerwise", False), schema, what=what)
    on_refresh = built.subspace.on_refresh
    if on_refresh not in built.moments.transports:  # LDAdam's rule, say, with momentum alone
        on_refresh = "rotate" if "rotate" in built.moments.transports else "keep"
    defaults = {"on_refresh": on_refresh, "stagger": layerwise, **method.defaults}
    for key, item in schema.items():
        default = defaults.get(key, _default(item, key, built))
        result[key] = options.parse(key, given.get(key, default), schema, what=what)
    _check_together(row, result, what)
    return result


def _check_together(row: str, options: Mapping[str, Any], what: str) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: in one sentence.
    """
    try:
        made = parts(row, options)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if made.needs_gradient and options["max_grad_norm"]:
        raise ValueError(
            f"{what} steps along the gradient itself, not along its projection alone: set max_grad_norm=0"
        )
    if "rank" in options:
        try:
            made.subspace.rank(2, 2, options["rank"])
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
    how = options.get("on_refresh", "keep")
    if how not in made.moments.transports:
        valid = ", ".join(made.moments.transports)
        raise ValueError(f"{what}: option on_refresh must be one of {valid} for these moments, got {how!r}")
    if options.get("proj_type") == "full" and (made.needs_gradient or not made.moments.elementwise):
        raise ValueError(
            f"{what}: proj_type=full needs a method that steps by Adam or momentum in the subspace alone: use std"
        )


def _default(item: Field[Any], key: str, built: Parts) -> Any:
    """Return an option's default: that of the part's instance where a part declares it."""
    owners: tuple[Any, ...] = (built.subspace, built.moments, built.reconstruction)
    for part in owners:
        if key in {f.name for f in fields(part)}:
            return getattr(part, key)
    return item.default


@lru_cache(maxsize=1024)
def _fill(prototypes: tuple[Any, ...], given: tuple[tuple[str, Any], ...], two_sided: bool) -> Parts:
    values = dict(given)
    filled = [replace(x, **{f.name: values[f.name] for f in fields(x) if f.name in values}) for x in prototypes]
    if two_sided:
        from hf_lowrank.methods.subspaces.two_sided import BothSides

        filled[0] = BothSides(filled[0])
    return Parts(*filled)


def _free_schema() -> dict[str, Field[Any]]:
    """Return the options of `lowrank`: its parts by name."""
    free = {kind: sorted(k for k, part in _registry(kind).items() if part.composable) for kind in KINDS}
    return {kind: options.choice(*names, help=f"which {kind}") for kind, names in free.items()}


def dense_options(method: str | None = None) -> set[str]:
    """Return the names of the options that dense parameters have: the shared ones and those of the moments.

    Args:
        method: a valid name, or None for what any method may have.
    """
    if method is not None and not METHODS[split(method)[0]].free:
        return set(options.schema(SharedOptions, _prototype("moments", METHODS[split(method)[0]].moments)))
    owners: list[Any] = [SharedOptions, *_registry("moments").values()]
    return {*KINDS, *(item.name for owner in owners for item in fields(owner))}
