"""The table of methods, and how a name with options becomes parts. Reading the table's texts needs no torch."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hf_lowrank import options as opt


if TYPE_CHECKING:
    from hf_lowrank.parts import Moments, Reconstruction, Subspace

KINDS = ("subspace", "moments", "reconstruction")

TRANSPORTS = ("keep", "rotate", "rotate_variance", "rotate_variance_complete", "reset")
"""What can happen to the moments at a refresh: nothing; M <- C M; the same and V transported; the same with the lost
mass completed; both zeroed with their step count."""


@dataclass(frozen=True)
class SharedOptions:
    """Options of every group."""

    seed: int = opt.integer(0, minimum=0, help="seed of the private generators")
    correct_bias: bool = opt.flag(True, help="Adam's bias correction")
    stochastic_rounding: bool = opt.flag(True, help="write bf16/fp16 weights by stochastic rounding, else to nearest")
    state_format: str = opt.choice("fp32", "8bit", "4bit", help="number format of the moments of matrices")
    basis_format: str = opt.choice("fp32", "bf16", "8bit", "4bit", help="number format of the bases")
    dense_state_format: str = opt.choice("fp32", "8bit", help="number format of the moments of dense parameters")
    layerwise: bool = opt.flag(False, help="free every gradient during backward; see LowRankOptimizer.train")
    max_grad_norm: float = opt.number(0.0, help="clip by the global norm of the projected gradients; 0: off")


@dataclass(frozen=True)
class LowRankOptions:
    """Options of every group of matrices."""

    rank: float = opt.rank(128, help="dimension of the subspace; clamped to the matrix's short side")
    update_proj_gap: int = opt.integer(200, minimum=1, help="steps between refreshes of the subspace")
    scale: float = opt.number(0.25, above=0.0, help="factor alpha on the low-rank update")
    proj_type: str = opt.choice(
        "std",
        "paper",
        "reverse_std",
        "left",
        "right",
        "full",
        help="which side of the weight is projected; full: both",
    )
    on_refresh: str = opt.choice(*TRANSPORTS, help="what happens to the moments at a refresh")
    stagger: bool = opt.flag(False, help="spread the refreshes of the matrices evenly over the interval")


@dataclass(frozen=True)
class Method:
    """One row of the table. A part is the name of a registered one or an instance of a class of your own.

    Attributes:
        subspace, moments, reconstruction: the parts.
        summary: what it is, in one line.
        paper: where it comes from.
        state: elements of state per m x n matrix (m <= n) at rank r.
        defaults: options whose default differs from the common one.
        limits: what it cannot do, in one line.
        free: whether the parts may be chosen by options (the row `lowrank`).
    """

    subspace: str | Subspace
    moments: str | Moments
    reconstruction: str | Reconstruction
    summary: str
    paper: str
    state: str = "mr + 2nr"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    limits: str = ""
    free: bool = False


_GALORE = "arXiv 2403.03507"
_I3S = "arXiv 2502.05790"
_FIRA = "arXiv 2410.01623"
_GOLORE = "arXiv 2410.11289"
_APOLLO = "arXiv 2412.05270"
_UPDATES_IN_HOOK = "layerwise: no accumulation, no max_grad_norm"
_ALONG_GRADIENT: dict[str, Any] = {"scale": 1.0}

METHODS: dict[str, Method] = {
    "galore_dominant_adamw": Method(
        "dominant", "adam", "project", "GaLore: Adam in the leading singular vectors of the gradient", _GALORE
    ),
    "galore_i3s_adamw": Method(
        "i3s", "adam", "project", "GaLore-I3S (SARA): singular vectors sampled with weight sigma", _I3S
    ),
    "galore_hybrid_adamw": Method(
        "hybrid", "adam", "project", "the first r0 singular vectors, the others uniform; M rotated at a refresh", _I3S
    ),
    "galore_uniform_adamw": Method(
        "uniform",
        "adam",
        "project",
        "singular vectors sampled uniformly",
        f"{_I3S}, section 4.5",
        limits="several processes equal one to 2e-2 only",
    ),
    "galore_random_adamw": Method(
        "random", "adam", "project", "uniformly random subspace, blind to the gradient", _GOLORE
    ),
    "fira_adamw": Method(
        "dominant",
        "adam",
        "fira",
        "Fira: GaLore plus the scaled, limited residual",
        _FIRA,
        "mr + 2nr + 2",
        limits=_UPDATES_IN_HOOK,
    ),
    "fira_i3s_adamw": Method(
        "i3s",
        "adam",
        "fira",
        "Fira in an I3S subspace",
        f"{_I3S}; {_FIRA}",
        "mr + 2nr + 2",
        limits=_UPDATES_IN_HOOK,
    ),
    "subtrack_adamw": Method(
        "grassmann",
        "adam",
        "project",
        "SubTrack: the basis follows the gradient by rank-1 Grassmann steps",
        "SubTrack (workshop); arXiv 2502.01586",
        "mr + 2nr (+ mn with accumulate)",
    ),
    "subtrack_pp_adamw": Method(
        "grassmann",
        "adam",
        "fira",
        "SubTrack++: the same with moments carried along and recovery scaling",
        "arXiv 2502.01586",
        "mr + 2nr + 2 (+ mn with accumulate)",
        {"on_refresh": "rotate_variance", "fira_form": "paper"},
        _UPDATES_IN_HOOK,
    ),
    "golore_adamw": Method(
        "golore", "adam", "project", "GoLore: dominant, then random for the last 20 % of the run", _GOLORE
    ),
    "golore_msgd": Method(
        "golore", "momentum", "project", "GoLore with momentum SGD", _GOLORE, "mr + nr", _ALONG_GRADIENT
    ),
    "galore_i3s_msgd": Method(
        "i3s", "momentum", "project", "low-rank momentum SGD in an I3S subspace", _I3S, "mr + nr", _ALONG_GRADIENT
    ),
    "galore_hybrid_msgd": Method(
        "hybrid",
        "momentum",
        "project",
        "low-rank momentum SGD as analysed in the I3S paper (Algorithm 4)",
        _I3S,
        "mr + nr",
        _ALONG_GRADIENT,
    ),
    "natural_galore_adamw": Method(
        "dominant",
        "natural_adam",
        "project",
        "Natural GaLore: natural gradient on a window of s projected gradients, then Adam",
        "arXiv 2410.16029",
        "mr + 2nr + snr",
    ),
    "q_galore_adamw": Method(
        "lazy",
        "adam",
        "project",
        "Q-GaLore: packed 4-bit basis, refreshed the less often the less it changes",
        "arXiv 2407.08296",
        "mr/8 + 2nr; with _8bit mr/8 + nr/2",
        {"basis_format": "4bit"},
    ),
    "ldadam": Method(
        "block_power",
        "adam",
        "error_feedback",
        "LDAdam: a power step at every step, both moments carried along, error feedback",
        "arXiv 2410.16103",
        "mr + 2nr + mn (mr + 2nr with error_feedback=off)",
        {**_ALONG_GRADIENT, "update_proj_gap": 1},
        _UPDATES_IN_HOOK,
    ),
    "flora_adafactor": Method(
        "sketch",
        "sketched_momentum",
        "flora",
        "FLora: Adafactor whose first moment is a Gaussian sketch",
        "arXiv 2402.03293",
        "nr + m + n",
        {**_ALONG_GRADIENT, "on_refresh": "rotate", "update_proj_gap": 1000},
        _UPDATES_IN_HOOK,
    ),
    "grass_adamw": Method(
        "rows", "adam", "project", "Grass: rows of the gradient, sampled by norm", "arXiv 2406.17660", "2r + 2nr"
    ),
    "online_subspace_adamw": Method(
        "online",
        "adam",
        "project",
        "Online Subspace Descent: the basis has an AdamW of its own",
        "arXiv 2408.12857",
        "3mr + 2nr",
        limits=_UPDATES_IN_HOOK,
    ),
    "apollo_random_adamw": Method(
        "sketch",
        "adam",
        "scaled_gradient",
        "APOLLO: the gradient, its columns scaled as Adam scales their random sketch",
        _APOLLO,
        "2nr + 1",
        _ALONG_GRADIENT,
        _UPDATES_IN_HOOK,
    ),
    "apollo_dominant_adamw": Method(
        "dominant",
        "adam",
        "scaled_gradient",
        "APOLLO with the leading singular vectors",
        _APOLLO,
        "mr + 2nr + 1",
        _ALONG_GRADIENT,
        _UPDATES_IN_HOOK,
    ),
    "apollo_mini_adamw": Method(
        "sketch",
        "adam",
        "scaled_gradient",
        "APOLLO-Mini: rank 1, one factor per matrix",
        _APOLLO,
        "2n + 1",
        {"rank": 1, "scale": 128.0, "scaling": "tensor"},
        _UPDATES_IN_HOOK,
    ),
    "gwt_adamw": Method(
        "haar",
        "adam",
        "details",
        "GWT: Adam on the Haar approximation, details scaled alike; rank 2^-level of the last axis",
        "arXiv 2501.07237",
        "2mn/2^level + 1",
        {"rank": 0.25, "proj_type": "right"},
        _UPDATES_IN_HOOK,
    ),
    "foam_adamw": Method(
        "fold",
        "folded_adam",
        "unfold",
        "FOAM: moments of means over 2^level entries; rank 2^-level of the last axis",
        "arXiv 2512.07112",
        "2mn/2^level",
        {"rank": 0.25, "proj_type": "right"},
        _UPDATES_IN_HOOK,
    ),
    "lowrank": Method(
        "dominant", "adam", "project", "any parts by name: subspace=, moments=, reconstruction=", "-", free=True
    ),
}

_OTHER_MOMENTS = {
    "adafactor": ("adafactor", "Adafactor with first moment", "mr + nr + r + n"),
    "adam_mini": ("adam_mini", "Adam-mini", "mr + nr + n (or r, or n/head)"),
    "came": ("came", "CAME", "mr + nr + 2(r + n)"),
}
for _family in ("galore_dominant", "galore_i3s", "galore_hybrid", "fira", "fira_i3s"):
    _row = METHODS[f"{_family}_adamw"]
    for _ending, (_moments, _name, _state) in _OTHER_MOMENTS.items():
        METHODS[f"{_family}_{_ending}"] = replace(
            _row,
            moments=_moments,
            summary=f"the subspace and step of `{_family}_adamw` with {_name}",
            state=_state + (" + 2" if _row.reconstruction == "fira" else ""),
        )


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
        raise ValueError(f"unknown method {name!r}{opt.suggest(name, METHODS)} (each also with _8bit and _layerwise)")
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
        result = {k: opt.parse(k, given.get(k, getattr(method, k)), choices, what=what) for k in choices}
    built = parts(row, result)
    owners += [built.moments, *([built.subspace, built.reconstruction] if low_rank else [])]
    schema = {k: v for k, v in opt.schema(*owners).items() if not (low_rank and k in built.subspace.without)}
    valid = {**schema, **(_free_schema() if method.free else {})}
    for key in given:
        opt.parse(key, given[key], valid, what=what)
    layerwise = opt.parse("layerwise", given.get("layerwise", False), schema, what=what)
    on_refresh = built.subspace.on_refresh
    if on_refresh not in built.moments.transports:  # LDAdam's rule, say, with momentum alone
        on_refresh = "rotate" if "rotate" in built.moments.transports else "keep"
    defaults = {"on_refresh": on_refresh, "stagger": layerwise, **method.defaults}
    for key, item in schema.items():
        default = defaults.get(key, _default(item, key, built))
        result[key] = opt.parse(key, given.get(key, default), schema, what=what)
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


def table() -> str:
    """Return the methods as a Markdown table, as it stands in the README."""
    head = ("name", "subspace x moments x reconstruction", "state per m x n matrix", "what it is", "paper", "cannot")
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in METHODS.items():
        made = (getattr(row, kind) for kind in KINDS)
        shown = " x ".join(part if isinstance(part, str) else type(part).__name__ for part in made)
        rows.append(f"| `{name}` | {shown} | {row.state} | {row.summary} | {row.paper} | {row.limits or '-'} |")
    return "\n".join(rows)


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
        from hf_lowrank.subspaces.two_sided import BothSides

        filled[0] = BothSides(filled[0])
    return Parts(*filled)


def _prototype(kind: str, part: Any) -> Any:
    return _registry(kind)[part]() if isinstance(part, str) else part


def _free_schema() -> dict[str, Field[Any]]:
    """Return the options of `lowrank`: its parts by name."""
    free = {kind: sorted(k for k, part in _registry(kind).items() if part.composable) for kind in KINDS}
    return {kind: opt.choice(*names, help=f"which {kind}") for kind, names in free.items()}


def dense_options() -> set[str]:
    """Return the names of the options that dense parameters have: the shared ones and those of the moments."""
    owners: list[Any] = [SharedOptions, *_registry("moments").values()]
    return {item.name for owner in owners for item in fields(owner)}


def _registry(kind: str) -> dict[str, type[Any]]:
    """Return the parts of one kind by name."""
    return _owner(kind).registry  # type: ignore[no-any-return]


@lru_cache
def _owner(kind: str) -> Any:
    """Return the base class of one kind of parts, having imported every file of its folder."""
    from hf_lowrank import parts as base

    package = importlib.import_module(f"hf_lowrank.{kind if kind == 'moments' else kind + 's'}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return getattr(base, kind.capitalize())
