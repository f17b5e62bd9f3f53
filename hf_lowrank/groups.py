"""Which parameters get a subspace, which decay, and which have a rate or a rule of their own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from hf_lowrank import modules
from hf_lowrank.engine.known import Known, remember
from hf_lowrank.methods import options, resolve
from hf_lowrank.methods.common import LowRankOptions
from hf_lowrank.methods.dense import KINDS, MIXED, SplitOptions
from hf_lowrank.methods.resolve import Config
from hf_lowrank.methods.table import METHODS
from hf_lowrank.tensors.layout import clamp_rank


_WORDS = {
    "embedding": "embedding",
    "head": f"output head (a linear layer outside the model's body, or one named {', '.join(modules.HEADS)})",
    "vector": "vector",
}
MATRIX = "matrix"
"""The kind of what gets a subspace, beside those of dense parameters."""

_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def param_groups(
    model: nn.Module,
    *,
    method: str | None = None,
    rank: float | None = None,
    target_modules: str | Sequence[str] | None = None,
    weight_decay: float | None = None,
    **method_options: Any,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into groups for LowRankOptimizer.

    Matrices of the model's body get a subspace: nn.Linear, transformers' Conv1D and stacked expert weights whose short
    side is above the rank; never embeddings, norms, biases, output heads, LoRA factors or convolutions. Weight decay
    goes where transformers' Trainer puts it: not on biases and norms.

    Args:
        model: the model; torch.compile, DDP and peft wrappers are seen through.
        method: a name from METHODS for these groups; None leaves it to the optimizer's.
        rank: dimension of the subspace, an integer or a fraction < 1 of the short side; by default the method's, or
            128.
        target_modules: None or "all-linear" for the default. Else a regular expression that must match a module's
            whole name, or a list (in one string: separated by commas) of such expressions or of substrings of names;
            a matrix named so is projected even where its short side is not above the rank.
        weight_decay: decay of the parameters that decay; None leaves it to the optimizer.
        method_options: options of the method, for instance update_proj_gap=200, scale=0.25; and of the split
            (methods.dense.SplitOptions), for instance embedding_lr=1e-3, head_rule="momentum_column_norm".

    Returns:
        Groups with the parameters and their names (`param_names`), those of matrices with the key `rank`. Embeddings,
        heads and vectors whose rate or rule differs have groups of their own; a weight that is embedding and head is
        an embedding.

    Raises:
        ValueError: if nothing matches; the message says what there is.
    """
    for key in {"lr", "betas", "eps"} & method_options.keys():
        text = (
            "give it to LowRankOptimizer, for all groups; embedding_lr, head_lr and vector_lr are rates of their own"
        )
        raise ValueError(f"param_groups takes no {key}: {text}")
    given = method_options if rank is None else {"rank": rank, **method_options}
    if method is not None:
        config = Config.of(method, given, model=True, facts=model_facts(model))
        own_seed = "seed" in given
        return groups_for(model, config, target_modules=target_modules, weight_decay=weight_decay, own_seed=own_seed)
    rank = options.parse("rank", given.pop("rank", 128), options.schema(LowRankOptions), what="rank")
    schema = options.schema(SplitOptions)
    apart = {key: options.parse(key, given.pop(key), schema, what="groups") for key in schema if key in given}
    split, dense = SplitOptions(**apart), {k: v for k, v in given.items() if k in resolve.dense_options()}

    def of_kind(kind: str) -> dict[str, Any]:
        return {**dense, **({"dense": split.rule(kind), "kind": kind} if apart else {})}

    return _split_up(model, {"rank": rank, **given}, of_kind, split, target_modules, weight_decay)


def groups_for(
    model: nn.Module,
    config: Config,
    *,
    target_modules: str | Sequence[str] | None = None,
    weight_decay: float | None = None,
    decaying: Iterable[str] | None = None,
    own_seed: bool = False,
) -> list[dict[str, Any]]:
    """Split a model's parameters as `param_groups` does, for a method whose options are resolved.

    Args:
        model, target_modules, weight_decay: see `param_groups`.
        config: the method and its options.
        decaying: names of the parameters that decay; by default those of `decay_names`.
        own_seed: whether the options' seed counts, and not that of the optimizer.
    """

    def own(c: Config) -> dict[str, Any]:
        found = {"method": c.method, **c.options, "config": c}
        return found if own_seed else {key: value for key, value in found.items() if key != "seed"}

    def of_kind(kind: str) -> dict[str, Any]:
        return own(config.dense(kind))

    own_options = own(config)
    if config.parts.subspace.whole:  # no rank leaves a matrix out, but one row or column
        own_options["rank"] = 1
    usual = METHODS[config.method].defaults
    return _split_up(model, own_options, of_kind, config.split, target_modules, weight_decay, usual, decaying)


def _split_up(
    model: nn.Module,
    own: Mapping[str, Any],
    dense: Callable[[str], Mapping[str, Any]],
    split: SplitOptions,
    target_modules: str | Sequence[str] | None,
    weight_decay: float | None,
    usual: Mapping[str, Any] = MappingProxyType({}),
    decaying: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Return groups of matrices with the options `own`, and of all else with the options `dense` of their kind."""
    target_parameters(model, rank=own["rank"], target_modules=target_modules)  # says so if there are none
    targets = set(target_parameters(model, rank=own["rank"], target_modules=target_modules, frozen=True))
    decaying = set(decay_names(model) if decaying is None else map(modules.cleaner(model), decaying))
    kinds, everything = modules.kinds(model), list(modules.trainable(model, frozen=True))
    found = [MATRIX if name in targets else kinds.get(id(p), MIXED) for name, p in everything]
    _check_split(model, split, found, usual)
    apart = (MATRIX, MIXED, *split.apart)
    groups, known = list[dict[str, Any]](), dict[Tensor, Known]()
    for kind in apart:
        rate = split.rate(kind)
        chosen = {**(own if kind == MATRIX else dense(kind)), **({} if rate is None else {"lr": rate})}
        config = chosen.pop("config", None)
        here = [one for one, its in zip(everything, found, strict=True) if (its if its in apart else MIXED) == kind]
        for decays in (True, False):
            decay = {"weight_decay": weight_decay if decays else 0.0}
            options = {**({} if decays and weight_decay is None else decay), **chosen}
            members = []
            for name, p in here:
                if (name in decaying) == decays:
                    known[p] = Known(name, options, config)  # of one that is trained later, too
                    if p.requires_grad:
                        members.append((name, p))
            if members:
                names, params = zip(*members, strict=True)
                groups.append({"params": [*params], "param_names": [*names], **options})
    remember(model, known)
    return groups


def _check_split(model: nn.Module, split: SplitOptions, found: Collection[str], usual: Mapping[str, Any]) -> None:
    """Refuse options of a kind of which all is projected, or nothing there; warn of a head that is an embedding.

    Those that are as a method has them by default (`usual`) may find nothing.
    """
    for kind in KINDS:
        for name in split.given(kind):
            if usual.get(name) == getattr(split, name):
                continue
            if kind not in found and kind == "head" and modules.tied(model):
                other = name.replace("head", "embedding")
                warnings.warn(
                    f"{name}: the output head is the embedding's weight, one parameter, to which {other} applies",
                    stacklevel=4,
                )
            elif kind not in found:
                raise ValueError(
                    f"{name}: {type(model).__name__} has no {_WORDS[kind]} that is without a subspace; leave it out"
                )


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Return what is known of a model, for the options that are such a fact: the size of an attention head."""
    config, names = getattr(model, "config", None), ("head_dim", "num_attention_heads", "hidden_size")
    found = (getattr(config, name, None) for name in names)  # a list where the stages of a vision model differ
    size, heads, width = (value if isinstance(value, int) else 0 for value in found)
    size = size or (width // heads if heads else 0)
    return {"head_dim": size} if size else {}


def decay_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that decay by Trainer's rule: all but nn.LayerNorm's, biases and norms."""
    clean = modules.cleaner(model)
    names = (
        clean(f"{prefix}.{name}".lstrip("."))
        for prefix, module in model.named_modules()
        if not isinstance(module, nn.LayerNorm)
        for name in module._parameters
    )
    return [name for name in names if not _NO_DECAY.search(name.lower())]


def target_parameters(
    model: nn.Module, *, rank: float, target_modules: str | Sequence[str] | None = None, frozen: bool = False
) -> list[str]:
    """Return the names of the parameters that get a subspace; see `param_groups` for the rules and errors.

    Args:
        model, rank, target_modules: see `param_groups`.
        frozen: also those that do not require a gradient now.
    """
    names = {id(p): name for name, p in modules.trainable(model, frozen=frozen)}
    candidates = {names[id(p)]: (module, p) for module, p in modules.matrices(model) if id(p) in names}
    if target_modules is None or target_modules in ("all-linear", "all_linear"):
        body = {id(p) for p in modules.body(model).parameters()}
        inside = {n: (m, p) for n, (m, p) in candidates.items() if not modules.is_head(m, p, body)}
        found = [name for name, (_, p) in inside.items() if _short(p) > clamp_rank(rank, 2**62, 2**62) or rank < 1]
        if not found:
            heads = sorted({m for m, _ in candidates.values()} - {m for m, _ in inside.values()})
            raise ValueError(_nothing_found(model, names, inside, rank, heads))
        return found
    found = []
    for pattern in _patterns(target_modules):
        if pattern in ("all-linear", "all_linear"):
            found += target_parameters(model, rank=rank, frozen=frozen)
            continue
        matched = [name for name, (module, _) in candidates.items() if _matches(pattern, module)]
        if not matched:
            raise ValueError(_no_match(model, pattern, [module for module, _ in candidates.values()]))
        found += matched
    return [name for name in candidates if name in found]


def _patterns(target_modules: Any) -> list[str]:
    """Return the patterns of a list; a comma separates as well, but one inside brackets or braces."""
    several = [target_modules] if isinstance(target_modules, str) else target_modules
    if not isinstance(several, Collection) or not all(isinstance(one, str) for one in several):
        raise ValueError(f"optim_target_modules is an expression, or a list of them, not {target_modules!r}")
    pieces = [piece.strip() for one in several for piece in re.split(r",(?![^(\[{]*[)\]}])", one) if piece.strip()]
    if not pieces:
        raise ValueError("optim_target_modules is empty: name modules, or leave it out to project the model's body")
    return pieces


def _matches(pattern: str, module: str) -> bool:
    if pattern in module:
        return True
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as error:
        raise ValueError(f"optim_target_modules: {pattern!r} is not a regular expression: {error}") from None


def _short(p: Tensor) -> int:
    return min(p.shape[-2:])


def _no_match(model: nn.Module, pattern: str, modules: list[str]) -> str:
    """Say that a pattern matches nothing, and what there is to match."""
    text = f"optim_target_modules: {pattern!r} matches no trainable matrix"
    if pattern.endswith(".weight"):
        return f"{text}: name modules, without .weight"
    if part := next((module for module in modules if re.search(pattern, module)), ""):
        return f"{text}: it matches a part of {part!r}, and an expression must match the whole name"
    kinds = sorted({module.split(".")[-1] for module in modules})
    if kinds == [""]:
        return f"{text}: the model is one {type(model).__name__} without a name of its own; leave the option out"
    return text + (options.suggest(pattern, kinds) if kinds else f": {type(model).__name__} has none")


def _nothing_found(
    model: nn.Module, names: dict[int, str], inside: dict[str, Any], rank: float, heads: Sequence[str]
) -> str:
    """Say why no matrix gets a subspace by default."""
    if inside:
        largest = max(_short(p) for _, p in inside.values())
        if largest == 1:
            return (
                f"every matrix of {type(model).__name__} is one row or one column, which has no subspace: train it "
                "with another optimizer, such as adamw_torch"
            )
        return (
            f"rank={rank} is not below the short side of any matrix (the largest is {largest}); choose a smaller rank"
        )
    lora = any(modules.LORA.search(name) for name in names.values())
    if heads:
        return (
            f"{'beside LoRA factors, which are low-rank already, ' if lora else ''}the only trainable matrices are "
            f"outside the model's body ({', '.join(heads)}): output heads stay dense unless target_modules names them"
        )
    if lora:
        return (
            "every trainable matrix is a LoRA factor, which is low-rank already; train the adapters with adamw_torch, "
            "or unfreeze the base weights"
        )
    return (
        f"{type(model).__name__} has no trainable nn.Linear, Conv1D or expert weight to project: train what it has "
        "with another optimizer, such as adamw_torch"
    )
