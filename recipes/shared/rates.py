"""Two learning rates, for any optimizer: one for the matrices of the body, one for all else."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import hf_lowrank
from recipes.shared.baselines import adapter_parameters


logger = logging.getLogger("hf_lowrank")
"""The package's own: the line beside it says what the matrices' rate would have been."""


def optimizer_with_two_rates(
    model: nn.Module, args: TrainingArguments, *, matrix_learning_rate: float | None = None
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes, for the optimizer that `args.optim` names.

    GaLore and its relatives have two rates by design: lr x scale for what they project, lr for embeddings, head and
    norms. A comparison that gives one rate to the others favours them. Here the matrices of any optimizer have their
    own: lr x scale (of APOLLO's, its root) is matrix_learning_rate for a low-rank one (Fira's residual moves at
    matrix_learning_rate / scale, as it does in its authors' code); with adapters, the factors have it.

    AdamW on bf16 weights becomes hf_lowrank's dense AdamW: torch's keeps its moments in bf16 as well, where the second
    one cannot fall any more, and rounds small updates away.

    Args:
        model: the model, adapters included.
        args: training arguments; learning_rate, weight_decay, betas and epsilon are honoured.
        matrix_learning_rate: rate of the matrices. Default: learning_rate, times `scale` for a low-rank optimizer.

    Raises:
        ValueError: if an option of the optimizer is not valid.
    """
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if issubclass(cls, hf_lowrank.LowRankOptimizer):
        if matrix_learning_rate is not None:
            configs = cls(**kwargs).configs  # with the defaults of the options that were not given
            for group, config in zip(kwargs["params"], configs, strict=True):
                if "rank" in group:
                    group["lr"] = matrix_learning_rate / config.parts.reconstruction.rate(config.options["scale"])
            logger.info("--matrix_learning_rate: matrices at lr x scale = %g instead", matrix_learning_rate)
        return cls, kwargs
    groups = _groups(model, args, args.learning_rate if matrix_learning_rate is None else matrix_learning_rate)
    if cls is torch.optim.AdamW and any(p.dtype == torch.bfloat16 for p in model.parameters()):
        cls = hf_lowrank.LowRankOptimizer
        kwargs = {key: kwargs[key] for key in ("lr", "betas", "eps")} | {"method": "lowrank", "seed": args.seed}
    return cls, {**kwargs, "params": groups}


def _groups(model: nn.Module, args: TrainingArguments, matrix_rate: float) -> list[dict[str, Any]]:
    """Split the trainable parameters by rate and by decay; vectors (norms, biases) do not decay."""
    matrices = set(adapter_parameters(model) or hf_lowrank.target_parameters(model, rank=1))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for matrix in (True, False):
        for decays in (True, False):
            members = [(n, p) for n, p in trainable if (n in matrices) == matrix and (p.dim() > 1) == decays]
            names, params = [n for n, _ in members], [p for _, p in members]
            values = {"param_names": names, "lr": matrix_rate if matrix else args.learning_rate}
            groups.append({"params": params, **values, "weight_decay": args.weight_decay if decays else 0.0})
    return [group for group in groups if group["params"]]
