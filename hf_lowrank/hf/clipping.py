"""Clipping where gradients are gone before Trainer could clip them: by the optimizer, as Trainer's argument says."""

from __future__ import annotations

import logging

from transformers import TrainingArguments

from hf_lowrank.engine.collectives import replicas
from hf_lowrank.engine.matrix import reduces
from hf_lowrank.optimizer import LowRankOptimizer


logger = logging.getLogger("hf_lowrank")


def clip_as_told(optimizer: LowRankOptimizer, args: TrainingArguments) -> None:
    """Let an optimizer that does not leave whole gradients to Trainer clip by Trainer's argument, as it is now.

    Where a group has a norm of its own, neither 0 nor what was taken from Trainer before, all stay as they are.
    """
    norm, configs = args.max_grad_norm or 0.0, optimizer.configs
    if not any(config.hooked or (reduces(config) and replicas() is not None) for config in configs):
        return
    if {float(group["max_grad_norm"]) for group in optimizer.param_groups} - {0.0, norm, optimizer.norm_of_trainer}:
        return
    along = [config.method for config in configs if config.low_rank and config.parts.needs_gradient]
    whole = [config.offloads for config in configs]
    if norm and (along or any(whole)) and not all(whole):
        logger.warning(
            "max_grad_norm=%g has no effect: %s steps along the gradient itself, which is not clipped beside the "
            "layerwise mode. Set layerwise=offload in all groups, or max_grad_norm=0",
            norm,
            (along or [configs[0].method])[0],
        )
        return
    for group in optimizer.param_groups:
        group["max_grad_norm"] = norm
    optimizer.norm_of_trainer = norm


def hold_clipping(args: TrainingArguments) -> None:
    """Keep Trainer from clipping in this step; its argument lies beside it, also where the step ends in an error or
    never comes, as at the end of an epoch of unknown length."""
    if "_held_max_grad_norm" in vars(args):
        return
    args._held_max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0


def give_clipping_back(args: TrainingArguments) -> None:
    """Undo `hold_clipping`, if that has been done."""
    if "_held_max_grad_norm" in vars(args):
        args.max_grad_norm = vars(args).pop("_held_max_grad_norm")
