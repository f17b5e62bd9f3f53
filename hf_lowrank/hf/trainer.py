"""A Trainer that builds our optimizers by name."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, trainer_utils
from transformers.training_args import OptimizerNames as OptimizerNames

from hf_lowrank.hf import checkpoints, console, names, weights
from hf_lowrank.hf.arguments import create_for, from_arguments, name_of
from hf_lowrank.hf.callback import LowRankCallback
from hf_lowrank.hf.layer_sampling import for_any_optimizer
from hf_lowrank.hf.model_card import describe_optimizer
from hf_lowrank.hf.training import around_training
from hf_lowrank.methods import resolve


names.add_to(OptimizerNames)  # so that TrainingArguments(optim=...) takes them


class LowRankTrainer(Trainer):  # type: ignore[misc]
    """A Trainer whose `create_optimizer` builds our optimizers by name, with no function of transformers replaced."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        console.show_messages()
        super().__init__(*args, **kwargs)
        callbacks = self.callback_handler.callbacks
        if not any(isinstance(callback, LowRankCallback) for callback in callbacks[:2]):
            callbacks.insert(1, LowRankCallback())  # behind what steers the loop, before all that report
        console.shorten_printers(callbacks)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the optimizer that `args.optim` names."""
        if create_for(self, model, LowRankTrainer.get_optimizer_cls_and_kwargs):
            return self.optimizer  # type: ignore[no-any-return]
        return super().create_optimizer(*([] if model is None else [model]))  # type: ignore[no-any-return]

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """Return an optimizer's class and arguments, as Trainer does; layer sampling is none of another's options."""
        if name_of(args) in resolve.names():
            return from_arguments(args, model)
        return Trainer.get_optimizer_cls_and_kwargs(for_any_optimizer(args), model)  # type: ignore[no-any-return]

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; however it ends, nothing of ours is left on the model or the output folder."""
        if resume_from_checkpoint is True:
            plain = inspect.unwrap(trainer_utils.get_last_checkpoint)
            resume_from_checkpoint = checkpoints.skipping_incomplete(plain)(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no whole checkpoint in {self.args.output_dir}: name one, or begin anew")
        with around_training(self):
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        checkpoints.naming_what_is_wrong(Trainer._load_optimizer_and_scheduler)(self, checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        checkpoints.with_sums(Trainer._save_optimizer_and_scheduler)(self, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights.with_every_weight(Trainer._load_from_checkpoint)(self, resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        weights.with_every_best_weight(Trainer._load_best_model)(self)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card, with a section on the optimizer."""
        super().create_model_card(*args, **kwargs)
        describe_optimizer(self)
