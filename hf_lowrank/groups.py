"""Which parameters get a subspace, and which decay. Needs neither transformers nor peft to know their models."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hf_lowrank.engine.known import remember
from hf_lowrank.methods import options, resolve
from hf_lowrank.methods.resolve import Config
from hf_lowrank.tensors.layout import clamp_rank


HEADS = ("lm_head", "classifier", "score", "head")
"""Modules that are output heads, which stay dense by default."""

_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)(?=\.|$)")
_LORA = re.compile(r"(^|\.)lora_")
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
        method_options: options of the method, for instance update_proj_gap=200, scale=0.25.

    Returns:
        Groups with (name, parameter) pairs, those of matrices with the key `rank`.

    Raises:
        ValueError: if nothing matches; the message says what there is.
    """
    given = method_options if rank is None else {"rank": rank, **method_options}
    if method is not None:
        config = Config.of(method, given, facts=model_facts(model))
        own_seed = "seed" in given
        return groups_for(model, config, target_modules=target_modules, weight_decay=weight_decay, own_seed=own_seed)
    rank = options.parse("rank", given.pop("rank", 128), options.schema(resolve.LowRankOptions), what="rank")
    dense = {key: value for key, value in given.items() if key in resolve.dense_options()}
    return _split_up(model, {"rank": rank, **given}, dense, target_modules, weight_decay)


def groups_for(
    model: nn.Module,
    config: Config,
    *,
    target_modules: str | Sequence[str] | None = None,
    weight_decay: float | None = None,
    own_seed: bool = False,
) -> list[dict[str, Any]]:
    """Split a model's parameters as `param_groups` does, for a method whose options are resolved.

    Args:
        model, target_modules, weight_decay: see `param_groups`.
        config: the method and its options.
        own_seed: whether the options' seed counts, and not that of the optimizer.
    """
    own, dense = ({"method": c.method, **c.options, "config": c} for c in (config, config.dense()))
    if not own_seed:
        del own["seed"], dense["seed"]
    return _split_up(model, own, dense, target_modules, weight_decay)


def _split_up(
    model: nn.Module,
    own: Mapping[str, Any],
    dense: Mapping[str, Any],
    target_modules: str | Sequence[str] | None,
    weight_decay: float | None,
) -> list[dict[str, Any]]:
    """Return groups of matrices with the options `own`, and of all else with the options `dense`."""
    target_parameters(model, rank=own["rank"], target_modules=target_modules)  # says so if there are none
    targets = set(target_parameters(model, rank=own["rank"], target_modules=target_modules, frozen=True))
    decaying = set(decay_names(model))
    groups: list[dict[str, Any]] = []
    for low_rank in (True, False):
        for decays in (True, False):
            decay = {"weight_decay": weight_decay if decays else 0.0}
            options = {**({} if decays and weight_decay is None else decay), **(own if low_rank else dense)}
            members = []
            for name, p in trainable(model, frozen=True):
                if (name in targets) == low_rank and (name in decaying) == decays:
                    remember(p, name, options)  # for one that is trained later
                    if p.requires_grad:
                        members.append((name, p))
            if members:
                groups.append({"params": members, **options})
    return groups


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Return what is known of a model, for the options that are such a fact: the size of an attention head."""
    config, names = getattr(model, "config", None), ("head_dim", "num_attention_heads", "hidden_size")
    found = (getattr(config, name, None) for name in names)  # a list where the stages of a vision model differ
    size, heads, width = (value if isinstance(value, int) else 0 for value in found)
    size = size or (width // heads if heads else 0)
    return {"head_dim": size} if size else {}


def trainable(model: nn.Module, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield (name without wrappers, parameter) of every parameter that requires a gradient, shared ones once.

    Args:
        model: the model.
        frozen: also those that do not.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"parameters are split by their names in a model: give the nn.Module, not {type(model).__name__}"
        )
    for name, p in model.named_parameters():
        if p.requires_grad or frozen:
            yield clean(name), p


def clean(name: str) -> str:
    """Strip what torch.compile, DDP and activation checkpointing add to a name."""
    return _WRAPPERS.sub("", name).lstrip(".")


def decay_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that decay by Trainer's rule: all but nn.LayerNorm's, biases and norms."""
    return [
        clean(f"{prefix}.{name}")
        for prefix, module in model.named_modules()
        if not isinstance(module, nn.LayerNorm)
        for name in module._parameters
        if not _NO_DECAY.search(clean(f"{prefix}.{name}").lower())
    ]


def target_parameters(
    model: nn.Module, *, rank: float, target_modules: str | Sequence[str] | None = None, frozen: bool = False
) -> list[str]:
    """Return the names of the parameters that get a subspace; see `param_groups` for the rules and errors.

    Args:
        model, rank, target_modules: see `param_groups`.
        frozen: also those that do not require a gradient now.
    """
    names = {id(p): name for name, p in trainable(model, frozen=frozen)}
    candidates = {names[id(p)]: (module, p) for module, p in _matrices(model) if id(p) in names}
    if target_modules is None or target_modules in ("all-linear", "all_linear"):
        body = {id(p) for p in _body(model).parameters()}
        inside = {n: (m, p) for n, (m, p) in candidates.items() if id(p) in body and m.split(".")[-1] not in HEADS}
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


def _matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name of the module, weight) of every weight that could be projected."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for prefix, module in model.named_modules():
        path = clean(prefix)
        experts = "expert" in f"{path}.{type(module).__name__}".lower()
        for name, p in module.named_parameters(recurse=False):
            linear = name == "weight" and p.dim() == 2 and _is_linear(module)
            stacked = experts and p.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            if (linear or stacked) and id(p) not in embeddings and not _LORA.search(path):
                yield path if linear else f"{path}.{name}", p


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # transformers' own, as GPT-2 has it


def _body(model: nn.Module) -> nn.Module:
    """Return the model without its head: `base_model` of a PreTrainedModel, below any wrapper."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    if callable(get_base := getattr(model, "get_base_model", None)):  # peft
        model = get_base()
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def _short(p: Tensor) -> int:
    return min(p.shape[-2:])


def _no_match(model: nn.Module, pattern: str, modules: list[str]) -> str:
    """Say that a pattern matches nothing, and what there is to match."""
    text = f"optim_target_modules: {pattern!r} matches no trainable matrix"
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
        return (
            f"rank={rank} is not below the short side of any matrix (the largest is {largest}); choose a smaller rank"
        )
    lora = any(_LORA.search(name) for name in names.values())
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
