"""The optimizers as names of transformers' Trainer: what is replaced there, and put back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments, trainer, trainer_utils
from transformers.training_args import OptimizerNames as OptimizerNames

from hf_lowrank.hf import checkpoints, console, names, weights
from hf_lowrank.hf.arguments import create_for, from_arguments, name_of
from hf_lowrank.hf.callback import LowRankCallback
from hf_lowrank.hf.layer_sampling import for_any_optimizer
from hf_lowrank.hf.model_card import describe_optimizer
from hf_lowrank.hf.training import around_training
from hf_lowrank.methods import resolve
from hf_lowrank.optimizer import LowRankOptimizer


_undo: list[Callable[[], None]] = []


def register() -> None:
    """Make every method a choice of `TrainingArguments(optim=...)` and `--optim`. Twice is the same as once."""
    console.show_messages()
    names.add_to(OptimizerNames)
    handlers = getattr(trainer, "_OPTIMIZER_HANDLERS", None)  # transformers 5.2 and later
    if handlers is not None:
        handlers.update({OptimizerNames(name): _handler for name in resolve.names()})
    if _undo:
        return
    _replace(
        Trainer, "get_optimizer_cls_and_kwargs", staticmethod(_with_our_names(Trainer.get_optimizer_cls_and_kwargs))
    )
    _replace(Trainer, "create_optimizer", _where_decay_is_decided(Trainer.create_optimizer))
    wrapped = checkpoints.skipping_incomplete(trainer_utils.get_last_checkpoint)
    _replace(trainer_utils, "get_last_checkpoint", wrapped)
    _replace(trainer, "get_last_checkpoint", wrapped)
    loading, saving = Trainer._load_optimizer_and_scheduler, Trainer._save_optimizer_and_scheduler
    _replace(Trainer, "_load_optimizer_and_scheduler", checkpoints.naming_what_is_wrong(loading))
    _replace(Trainer, "_save_optimizer_and_scheduler", checkpoints.with_sums(saving))
    _replace(Trainer, "_load_from_checkpoint", weights.with_every_weight(Trainer._load_from_checkpoint))
    _replace(Trainer, "_load_best_model", weights.with_every_best_weight(Trainer._load_best_model))
    _replace(Trainer, "train", _surrounded(Trainer.train))
    _replace(Trainer, "create_model_card", _with_our_section(Trainer.create_model_card))
    for printer in console.PRINTERS:
        _replace(printer, "on_log", console.printing_less(printer.on_log))
    trainer.DEFAULT_CALLBACKS.append(LowRankCallback)
    _undo.append(lambda: trainer.DEFAULT_CALLBACKS.remove(LowRankCallback))


def unregister() -> None:
    """Undo `register`."""
    while _undo:
        _undo.pop()()
    handlers = getattr(trainer, "_OPTIMIZER_HANDLERS", {})
    for name in resolve.names():
        handlers.pop(name, None)
    names.remove_from(OptimizerNames)


def _handler(context: Any) -> tuple[type[LowRankOptimizer], dict[str, Any]]:
    """Entry of transformers' handler table."""
    return from_arguments(context.args, context.model)


def _with_our_names(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> Any:
        if name_of(args) in resolve.names():
            return from_arguments(args, model)
        return original(for_any_optimizer(args), model)

    return get_optimizer_cls_and_kwargs


def _where_decay_is_decided(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_optimizer(self: Trainer, model: nn.Module | None = None) -> Any:
        if create_for(self, model, Trainer.get_optimizer_cls_and_kwargs):
            return self.optimizer
        return original(self, *([] if model is None else [model]))

    return create_optimizer


def _surrounded(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        with around_training(self):
            return original(self, *args, **kwargs)

    return train


def _with_our_section(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def create_model_card(self: Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        describe_optimizer(self)

    return create_model_card


def _replace(owner: Any, name: str, value: Any) -> None:
    before = vars(owner)[name]
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, before))
