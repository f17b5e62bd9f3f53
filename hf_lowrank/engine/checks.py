"""What groups must be, and what is said when they are not."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from math import inf, nan
from typing import Any

from torch import Tensor

from hf_lowrank.engine.checkpoint import STRUCTURE
from hf_lowrank.engine.known import names_of
from hf_lowrank.engine.plan import Plan
from hf_lowrank.engine.sharding import check_weight
from hf_lowrank.engine.unit import TYPES
from hf_lowrank.methods import options as opt
from hf_lowrank.methods.dense import SAME, SplitOptions
from hf_lowrank.methods.resolve import SUFFIXES, Config, complete, option_names, split
from hf_lowrank.methods.table import METHODS


TORCH_KEYS = {"params", "param_names", "lr", "betas", "eps", "weight_decay", "name", "initial_lr", "method", "format"}
"""Keys of a group that are no options of a method."""


ROUNDING = 1e-15
"""How far below 0 a schedule that ends there may land by rounding, as torch's LinearLR does."""


def check_numbers(group: Mapping[str, Any]) -> None:
    """Refuse a learning rate, betas, eps or weight decay that cannot be."""
    betas = group["betas"]
    beta1, beta2 = betas if isinstance(betas, (tuple, list)) and len(betas) == 2 else (nan, nan)
    for name, value, below in (
        ("lr", group["lr"], inf),
        ("eps", group["eps"], inf),
        ("weight_decay", group["weight_decay"], inf),
        ("betas", beta1, 1.0),
        ("betas", beta2, 1.0),
    ):
        if isinstance(value, Tensor) and value.device.type != "cpu":
            raise ValueError(f"{name} lies on {value.device}, and every step would wait to read it: give a number")
        try:
            number = nan if isinstance(value, (str, bool)) else float(value)
        except (TypeError, ValueError):
            number = nan
        if not (-ROUNDING if name == "lr" else 0) <= number < below:
            what = "two numbers" if name == "betas" else "a number"
            text = "; YAML reads 1e-2 as text: write 0.01 or 1.0e-2" if isinstance(value, str) else ""
            raise ValueError(f"{name} must be {what} in [0, {below:g}), got {group[name]!r}{text}")


def check_parameters(group: Mapping[str, Any], config: Config) -> None:
    """Refuse parameters that cannot be trained."""
    names, count = names_of(group), len(group["params"])
    if len(names) != count:
        raise ValueError(f"a group has {count} parameters but {len(names)} names: use add_param_group to add some")
    for i, p in enumerate(group["params"]):
        name = names[i] or f"{i} of a group"
        if p.dtype not in TYPES:
            raise ValueError(f"parameter {name} is {p.dtype}; train it in float32, bfloat16 or float16, or freeze it")
        if config.low_rank and (p.dim() not in (2, 3) or 0 in p.shape):
            raise ValueError(
                f"parameter {name} has shape {tuple(p.shape)}; only matrices and stacks of matrices are projected. "
                "Put it in a group without 'rank'. (FSDP1 and DeepSpeed's ZeRO flatten parameters: use FSDP2 or DDP.)"
            )
        check_weight(name, p, config)


def check_materialized(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to step parameters on the meta device, which hold no numbers; their memory can still be planned."""
    for group in groups:
        for name, p in zip(names_of(group), group["params"], strict=True):
            if p.is_meta:
                called = name or f"of shape {tuple(p.shape)}"
                raise ValueError(
                    f"parameter {called} is on the meta device, where there is nothing to train: load the weights, or "
                    "call model.to_empty and initialize them, and then build the optimizer"
                )


def check_given_once(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse groups of one's own beside those that Trainer has split.

    Raises:
        TypeError: always the same.
    """
    if args and "params" in kwargs:
        raise TypeError(
            "the parameters were given twice: get_optimizer_cls_and_kwargs(args, model) has split the model into "
            "groups already, so build the optimizer as cls(**kwargs), without groups of your own"
        )


def check_together(groups: Sequence[Mapping[str, Any]], configs: Sequence[Config]) -> None:
    """Refuse groups that do not go together.

    Raises:
        ValueError: naming the option.
    """
    norms = {float(group["max_grad_norm"]) for group in groups} - {0.0}
    if len(norms) > 1:
        raise ValueError(f"all groups are clipped together: give them one max_grad_norm, not {sorted(norms)}")
    whole = [config.offloads for config in configs]
    if norms and any(whole) and not all(whole):
        raise ValueError("layerwise=offload clips by the norm of whole gradients: set it in all groups, or in none")
    for config in configs:
        options = config.options
        if config.low_rank and options.get("reduce_projected") and config.offloads:
            raise ValueError(
                "reduce_projected does not go together with layerwise=offload, where gradients wait as they are: "
                "leave out one of them"
            )
        if config.low_rank and options.get("reduce_projected") and options.get("async_refresh"):
            raise ValueError(
                "reduce_projected does not go together with async_refresh: every process would choose bases of its own"
            )
    along = [config.method for config in configs if config.low_rank and config.parts.needs_gradient]
    if norms and along and not all(whole):
        raise ValueError(f"{along[0]} steps along the gradient itself, which is not clipped: set max_grad_norm=0")


def check_method(name: str, configs: Sequence[Config]) -> None:
    """Refuse a name beside groups that all name another method, by which they would be stepped."""
    row, endings = split(name)
    made = dict.fromkeys(config.method for config in configs)
    matrices = [config.options for config in configs if config.low_rank and config.method == row]
    usual = complete(row, {}) if endings else {}
    lost = {key for key, value in endings.items() if {value} != {o[key] for o in matrices} == {usual[key]}}
    if row not in made or any(given.keys() <= lost for given in SUFFIXES.values()):
        raise ValueError(
            f"the groups were made for {', '.join(made)} and the optimizer is to be {name}: give param_groups and "
            "LowRankOptimizer the same method, or the latter none"
        )


def doubts(groups: Sequence[Mapping[str, Any]], configs: Sequence[Config]) -> Iterator[str]:
    """Yield what looks as if `param_groups` had not been told of the method."""
    matrices = [
        config for group, config in zip(groups, configs, strict=True) if any(p.dim() > 1 for p in group["params"])
    ]
    if matrices and not any(config.low_rank for config in configs):
        yield (
            "no group has a 'rank', so nothing is projected and all moments are full: take the groups from "
            "hf_lowrank.param_groups(model, rank=...)"
        )
    pairs = [*zip(groups, configs, strict=True)]
    others = [p for group, config in pairs if not config.low_rank for p in group["params"] if p.dim() in (2, 3)]
    whole = [(group["rank"], c.method) for group, c in pairs if c.low_rank and c.parts.subspace.whole]
    for rank, method in dict.fromkeys(whole):
        if small := sum(1 < min(p.shape[-2:]) <= rank for p in others):
            yield (
                f"{method} has no rank, and its groups have rank={rank}: {small} matrices that are not larger take "
                f"the rule of norms. Take the groups from hf_lowrank.param_groups(model, method={method!r})"
            )
    usual = [c for c in matrices if not c.low_rank and c.split == SplitOptions() and c.options["dense"] == SAME]
    for method in dict.fromkeys(config.method for config in usual):
        if METHODS[method].defaults.keys() & opt.schema(SplitOptions):
            yield (
                f"{method} has rules of its own for embeddings and heads, and no group says which it holds: take the "
                f"groups from hf_lowrank.param_groups(model, method={method!r})"
            )


def config_of(group: Mapping[str, Any]) -> Config:
    """Return the options of a group that was completed before; other keys are a schedule's own."""
    low_rank = "rank" in group
    given = {key: group[key] for key in option_names(group["method"], group, low_rank=low_rank) if key in group}
    return Config.of(group["method"], given, low_rank=low_rank)


def edited(group: Mapping[str, Any], config: Config, stepped: Container[Tensor]) -> Config:
    """Return the options of a group as they are now.

    Keys that are no option are left alone: a schedule keeps its own there.

    Args:
        group: the group.
        config: what it had when it was last looked at.
        stepped: the parameters that have a state, which that says the form of.

    Raises:
        ValueError: for a value that is not valid, and for an edit of what the state is built on.
    """
    changed = [key for key, value in config.options.items() if group.get(key, value) != value]
    if group["method"] != config.method:
        raise ValueError(f"method cannot be changed while training; it was {config.method}")
    if not changed:
        return config
    for key in changed:
        if key in STRUCTURE:
            raise ValueError(f"{key} cannot be changed while training; it was {config.options[key]}")
    given = {key: group.get(key, value) for key, value in config.options.items()}
    now = Config.of(config.method, given, low_rank=config.low_rank)
    for name, p in zip(names_of(group), group["params"], strict=True):
        if p in stepped and Plan.of(p, now, name).kept != Plan.of(p, config, name).kept:
            was = ", ".join(f"{key} ({config.options[key]})" for key in changed)
            raise ValueError(f"{was} says which state there is and cannot be changed while training")
    return now
