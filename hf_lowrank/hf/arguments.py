"""From training arguments to an optimizer: every argument honoured or refused."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_lowrank import layer_sampling
from hf_lowrank.engine import refusals
from hf_lowrank.engine.agreement import same_settings
from hf_lowrank.engine.averaging import exclude_
from hf_lowrank.engine.matrix import reduces
from hf_lowrank.groups import groups_for, model_facts
from hf_lowrank.hf.clipping import give_clipping_back
from hf_lowrank.methods import options as opt
from hf_lowrank.methods import resolve
from hf_lowrank.methods.common import OFFLOAD, ReplicaOptions
from hf_lowrank.methods.options import split_assignments
from hf_lowrank.methods.resolve import Config
from hf_lowrank.optimizer import LowRankOptimizer


logger = logging.getLogger("hf_lowrank")


def keywords_of(
    model: nn.Module,
    config: Config,
    values: dict[str, Any],
    target_modules: Any,
    decaying: Iterable[str] | None = None,
) -> dict[str, Any]:
    """Return what LowRankOptimizer takes."""
    decay = values.pop("weight_decay")
    groups = groups_for(model, config, target_modules=target_modules, weight_decay=decay, decaying=decaying)
    return {"params": groups, "method": config.method, **values}


def warn_of_rank(config: Config, given: Iterable[str]) -> None:
    """Say that a method without a subspace has no rank."""
    if "rank" in given and config.parts.subspace.whole:
        logger.warning("%s has no subspace, so rank has no effect: leave it out", config.method)


def of_replicas(options: dict[str, Any]) -> dict[str, Any]:
    """Take out the options that are the optimizer's own under DistributedDataParallel; return those that are on."""
    schema = opt.schema(ReplicaOptions)
    given = {key: options.pop(key) for key in schema if key in options}
    return {key: value for key in given if (value := opt.parse(key, given[key], schema, what="optimizer"))}


def hyperparameters(args: TrainingArguments | None) -> dict[str, Any]:
    """Return what LowRankOptimizer takes of training arguments; without any what it has by default."""
    if args is None:
        return {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "seed": 0}
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
    }


class AskedWithoutModel(LowRankOptimizer):
    """What Trainer is handed where it asks for an optimizer without a model: groups must say what is projected."""

    without = (
        "get_optimizer_cls_and_kwargs(args) was asked without a model, so no group says which matrices get a "
        "subspace. Ask with the model: cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model), then "
        "cls(**kwargs); or take groups from hf_lowrank.param_groups(model, method=...)"
    )

    def __init__(self, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        groups = list(params)
        if not any(isinstance(group, dict) and "rank" in group for group in groups):
            raise ValueError(self.without)
        super().__init__(groups, *args, **kwargs)


def create_for(trainer: Any, model: nn.Module | None, asked: Any) -> bool:
    """Give a Trainer that decides by itself which weights decay the optimizer that its arguments name; tell whether.

    Any other asks `get_optimizer_cls_and_kwargs`, which knows of no Trainer; so does one that has its own in the place
    of `asked`.
    """
    kind = type(trainer)
    decides = kind.get_decay_parameter_names is not Trainer.get_decay_parameter_names
    decides &= kind.get_optimizer_cls_and_kwargs is asked
    there = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    if there or name_of(trainer.args) not in resolve.names():
        return False
    if trainer.args.world_size > 1:
        given, asked_for = trainer.args, name_of(trainer.args)  # what decides on collectives before the first step
        more = [(name, getattr(given, name)) for name in ("optim_args", "optim_target_modules")]
        same_settings([("optim", asked_for), *more], given.device)
    if not decides:
        return False
    model = trainer.model if model is None else model
    cls, kwargs = from_arguments(trainer.args, model, decaying=trainer.get_decay_parameter_names(model))
    trainer.optimizer = cls(**kwargs)
    return True


def from_arguments(
    args: TrainingArguments, model: nn.Module | None, *, decaying: Iterable[str] | None = None
) -> tuple[type[LowRankOptimizer], dict[str, Any]]:
    """Build the class and its arguments as Trainer wants them, every training argument honoured or refused.

    Args:
        args: the training arguments.
        model: what is trained; None for a class that asks for groups.
        decaying: names of the parameters that decay; by default those of Trainer's rule.
    """
    refuse_unsupported(args)
    give_clipping_back(args)
    values = hyperparameters(args)
    if model is None:  # LLaMA-Factory asks without a model to read lr, betas and eps
        return AskedWithoutModel, {"method": name_of(args), **{k: values[k] for k in ("lr", "betas", "eps")}}
    options: dict[str, Any] = split_assignments(args.optim_args)
    layer_sampling.take(options)  # a callback's
    own = {field: field for field in TrainingArguments.__dataclass_fields__}
    for option, argument in {**own, **_TRAINING_ARGUMENTS}.items():
        if option in options:
            raise ValueError(f"optim_args: {option} is set by the training argument {argument}, not here")
    shared = of_replicas(options)
    if shared and _fsdp_version(args) is not None:
        raise ValueError("optim_args: shard_state is for DDP; FSDP2 shards the state by itself, so leave it out")
    name = name_of(args)
    config = taken_over(args, Config.of(name, options, model=True, facts=model_facts(model)), name)
    warn_of_rank(config, options)
    keywords = keywords_of(model, config, values, args.optim_target_modules, decaying)
    replicated = _replicated(args)
    if replicated and reduces(config):  # Trainer wraps the model after this
        exclude_(model, {p for group in keywords["params"] if "rank" in group for p in group["params"]})
    return LowRankOptimizer, {**keywords, "share_refreshes": replicated, **(shared if replicated else {})}


def _fsdp_version(args: TrainingArguments) -> int | None:
    """Return 1 or 2 under FSDP, else None (Trainer ignores --fsdp where there is no accelerator)."""
    shared = AcceleratorState._shared_state
    if shared:
        fsdp = shared.get("distributed_type") == DistributedType.FSDP
        return int(shared["fsdp_plugin"].fsdp_version) if fsdp else None
    if not getattr(args, "fsdp", None):
        return None
    config = getattr(args, "fsdp_config", None) or {}
    return int(config.get("version", config.get("fsdp_version", 2)))


def _replicated(args: TrainingArguments) -> bool:
    """Tell whether this is DistributedDataParallel."""
    return bool(args.world_size > 1 and _fsdp_version(args) is None)


def taken_over(args: TrainingArguments, config: Config, name: str) -> Config:
    """Return the options with what follows where Trainer does not find whole gradients, whose norm it would clip.

    Raises:
        ValueError: for what cannot be honoured there.
    """
    in_hook = config.parts.needs_gradient
    layerwise, reduced = config.options["layerwise"], config.options["reduce_projected"]
    if _fsdp_version(args) and (reason := refusals.of_shards(config)):
        raise ValueError(reason)
    if not (layerwise or (reduced and _replicated(args))):
        return config
    if args.auto_find_batch_size:
        raise ValueError(
            f"{name} takes gradients during backward, and auto_find_batch_size begins again after a backward that has "
            "run out of memory: set per_device_train_batch_size and leave it out"
        )
    if args.fp16:
        raise ValueError(f"{name} finds gradients before --fp16's scaler has unscaled them: use --bf16, or fp32")
    if _replicated(args) and (reason := refusals.of_replicas(config)):
        raise ValueError(f"{name} does not run under DistributedDataParallel: {reason}")
    norm, jit = args.max_grad_norm or 0.0, getattr(args, "enable_jit_checkpoint", False)  # saved before the step
    if in_hook and (norm or jit or args.gradient_accumulation_steps > 1):
        config = config.with_(layerwise=OFFLOAD)
    if config.offloads:
        logger.info("%s: whole gradients wait in host memory until the step (layerwise=offload)", name)
    elif norm:
        logger.info("max_grad_norm=%g clips by the norm of the projected gradients (projected_grad_norm)", norm)
    return config.with_(max_grad_norm=norm)


_TRAINING_ARGUMENTS = {
    "lr": "learning_rate",
    "betas": "adam_beta1, adam_beta2",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
    "target_modules": "optim_target_modules",
    "total_steps": "max_steps or num_train_epochs",
    "args": "optim",
    "model": "optim",
    "method": "optim",
}


def refuse_unsupported(args: TrainingArguments) -> None:
    """Refuse what would train wrongly, naming the way out.

    Raises:
        ValueError: under DeepSpeed and FSDP1.
    """
    launched = AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED
    if getattr(args, "deepspeed", None) or launched:
        raise ValueError(
            f"{name_of(args)} does not run under DeepSpeed: ZeRO flattens the matrices that are projected. Instead of "
            "--deepspeed or accelerate launch --use_deepspeed use FSDP2 (--fsdp; names in _8bit and _layerwise work "
            "there too) or DDP (torchrun; --optim_args shard_state=true shards the state as ZeRO-1 does)."
        )
    if _fsdp_version(args) == 1:
        raise ValueError(
            f"{name_of(args)} does not run under FSDP1, which flattens the matrices that are projected. "
            'Use FSDP2: --fsdp with {"version": 2} in --fsdp_config.'
        )


def name_of(args: Any) -> str:
    """Return the name of the optimizer that training arguments choose, a member of OptimizerNames or a string."""
    return str(getattr(args.optim, "value", args.optim))


def unwrapped(optimizer: Any) -> Any:
    """Return what a Trainer's optimizer is inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
