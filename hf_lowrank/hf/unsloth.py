"""unsloth's `embedding_learning_rate` as options of ours. Needs no unsloth."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_lowrank.hf.arguments import name_of
from hf_lowrank.methods import resolve


def take_embedding_learning_rate(args: Any, model: nn.Module) -> None:
    """Turn `embedding_learning_rate` of UnslothTrainingArguments into embedding_lr and head_lr of `optim_args`.

    Where it is set, UnslothTrainer (2026.10) splits the parameters by itself, and no group of its own has a rank. It
    means the weights that are trained of the input and of the output embeddings; a weight that is both is one.

    Args:
        args: the training arguments, changed in place if they choose one of our optimizers.
        model: the model to train.
    """
    rate = getattr(args, "embedding_learning_rate", None)
    if rate is None or name_of(args) not in resolve.names():
        return
    found: dict[int, str] = {}
    for option in ("embedding_lr", "head_lr"):
        get = getattr(model, "get_input_embeddings" if option == "embedding_lr" else "get_output_embeddings", None)
        weight = getattr(get() if get else None, "weight", None)
        if weight is not None and weight.requires_grad:
            found.setdefault(id(weight), option)
    args.embedding_learning_rate = None
    args.optim_args = ",".join([*filter(None, [args.optim_args]), *(f"{option}={rate}" for option in found.values())])
