"""Two learning rates, for any optimizer: one for the matrices of the body, one for all else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_lowrank
from recipes.baselines import adapter_parameters


def optimizer_with_two_rates(
    model: nn.Module, args: TrainingArguments, *, matrix_lr_scale: float = 1.0
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes, for the optimizer that `args.optim` names.

    GaLore and its relatives have two rates by design: lr x scale for what they project, lr for embeddings, head and
    norms. A comparison that gives one rate to the others favours them. Here the matrices of every optimizer train at
    learning_rate x matrix_lr_scale (times its option `scale` where it has one); with adapters, the factors do.

    AdamW on bf16 weights becomes hf_lowrank's dense AdamW: torch's keeps its moments in bf16 as well, where the second
    one cannot fall any more, and rounds small updates away.

    Args:
        model: the model, adapters included.
        args: training arguments; learning_rate, weight_decay, betas and epsilon are honoured.
        matrix_lr_scale: rate of the matrices, relative to learning_rate.

    Raises:
        ValueError: if an option of the optimizer is not valid.
    """
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if issubclass(cls, hf_lowrank.LowRankOptimizer):
        for group in kwargs["params"]:
            group["lr"] = args.learning_rate * (matrix_lr_scale if "rank" in group else 1.0)
        return cls, kwargs
    groups = _groups(model, args, matrix_lr_scale)
    if cls is torch.optim.AdamW and any(p.dtype == torch.bfloat16 for p in model.parameters()):
        cls = hf_lowrank.LowRankOptimizer
        kwargs = {key: kwargs[key] for key in ("lr", "betas", "eps")} | {"method": "lowrank", "seed": args.seed}
    return cls, {**kwargs, "params": groups}


def _groups(model: nn.Module, args: TrainingArguments, matrix_lr_scale: float) -> list[dict[str, Any]]:
    """Split the trainable parameters by rate and by decay; vectors (norms, biases) do not decay."""
    matrices = set(adapter_parameters(model) or hf_lowrank.target_parameters(model, rank=1))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for matrix in (True, False):
        for decays in (True, False):
            members = [(n, p) for n, p in trainable if (n in matrices) == matrix and (p.dim() > 1) == decays]
            lr = args.learning_rate * (matrix_lr_scale if matrix else 1.0)
            groups.append({"params": members, "lr": lr, "weight_decay": args.weight_decay if decays else 0.0})
    return [group for group in groups if group["params"]]
