"""From a row of the table to a model, its arguments and callbacks; and back to an ordinary model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_lowrank
from recipes.shared.baselines.adapters import FACTOR, merged
from recipes.shared.baselines.arguments import BaselineArguments
from recipes.shared.baselines.quantized import dequantize_
from recipes.shared.baselines.table import BASELINES, Stage, fit_for


def prepare_(
    model: nn.Module,
    args: BaselineArguments,
    training_args: TrainingArguments,
    *,
    stage: Stage | None = None,
    also_train: str = ".*",
) -> list[TrainerCallback]:
    """Turn a model and its training arguments into those of a baseline, in place.

    Args:
        model: a PreTrainedModel; the targets of a baseline that changes the model are replaced.
        args: which baseline; with None nothing happens.
        training_args: `optim` becomes a dense one where it names a low-rank optimizer.
        stage: what is done with the model, for which not every baseline is made; None does not ask.
        also_train: regular expression, searched in names, of the parameters outside the adapters that train too. The
            weights under the adapters never do.

    Returns:
        What `Trainer(callbacks=...)` needs.

    Raises:
        ValueError: if the targets match nothing, a number is out of range, or the baseline is for another stage.
    """
    if args.baseline is None:
        return []
    if args.baseline not in BASELINES:
        raise ValueError(f"--baseline must be one of {', '.join(BASELINES)}, not {args.baseline!r}")
    baseline = BASELINES[args.baseline]
    if stage and baseline.only_for not in (None, stage):
        raise ValueError(
            f"--baseline {args.baseline} is for {baseline.only_for} alone; {', '.join(fit_for(stage))} are for {stage}"
        )
    if baseline.only_optim or _is_low_rank(training_args.optim):
        training_args.optim = OptimizerNames(baseline.optim)
    training_args.optim_args = training_args.optim_target_modules = None
    if baseline.adapt_ is None:
        return []
    if args.adapter_rank < 1:
        raise ValueError(f"--adapter_rank must be at least 1, not {args.adapter_rank}")
    callbacks = [baseline.callback(args, training_args)] if baseline.callback else []
    baseline.adapt_(model, _targets(model, args), args, also_train=also_train, seed=training_args.seed)
    return callbacks


def trainer_of(args: BaselineArguments) -> Callable[..., Trainer]:
    """Return what is called in the place of Trainer, with the same arguments.

    Raises:
        ValueError: if a number is out of range.
    """
    trainer = BASELINES[args.baseline].trainer if args.baseline else None
    return trainer(args) if trainer else Trainer


def to_plain_(model: nn.Module) -> None:
    """Merge what `prepare_` put into a model, in fp32, so that it is an ordinary one again."""
    dequantize_(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, merged(module))
        elif hasattr(module, "product"):
            model.set_submodule(name, module.product())


def adapter_parameters(model: nn.Module) -> list[str]:
    """Return the names of what stands in for matrices: the trainable parameters of the modules that were put in."""
    return [name for name, p in model.named_parameters() if p.requires_grad and FACTOR.search(name)]


def _targets(model: nn.Module, args: BaselineArguments) -> list[str]:
    """Return the names of the modules to adapt, by the rule that chooses matrices for a low-rank optimizer."""
    packed = getattr(model, "is_loaded_in_4bit", False)  # into one column, and frozen
    rank = 0.5 if packed else 1  # a share of the short side asks for none
    found = hf_lowrank.target_parameters(model, rank=rank, target_modules=args.adapter_targets, frozen=packed)
    return [name.removesuffix(".weight") for name in found]


def _is_low_rank(optim: Any) -> bool:
    name = str(getattr(optim, "value", optim)).removesuffix("_layerwise").removesuffix("_8bit")
    return name in hf_lowrank.METHODS
