"""A pair for Trainer's `optimizer_cls_and_kwargs`, with which nothing of transformers needs to be replaced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from hf_lowrank.engine.averaging import exclude_from_ddp
from hf_lowrank.engine.collectives import replicas
from hf_lowrank.groups import model_facts
from hf_lowrank.hf.arguments import (
    AskedWithoutModel,
    hyperparameters,
    keywords_of,
    of_replicas,
    taken_over,
    warn_of_rank,
)
from hf_lowrank.methods.resolve import Config
from hf_lowrank.optimizer import LowRankOptimizer


def optimizer_cls_and_kwargs(
    model: nn.Module,
    method: str,
    *,
    args: TrainingArguments | None = None,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    rank: float | None = None,
    target_modules: Any = None,
    seed: int | None = None,
    **options: Any,
) -> tuple[type[LowRankOptimizer], dict[str, Any]]:
    """Return what `Trainer(optimizer_cls_and_kwargs=...)` takes; nothing needs to be registered for it.

    Args:
        model: the model to train.
        method: a name from METHODS.
        args: where lr, betas, eps, weight_decay and seed come from if they are not given, and max_grad_norm in the
            layerwise mode. Trainer does not pass its arguments on along this route, so give them here or there.
        lr, betas, eps, weight_decay, seed: defaults without `args`: 1e-3, (0.9, 0.999), 1e-8, 0, 0.
        rank: by default the method's own, 128 for most.
        target_modules, options: see `param_groups`; and shard_state=True, as LowRankOptimizer takes it.

    Raises:
        ValueError: for an unknown method or option, where nothing can be projected, or for what the layerwise mode
            cannot honour of `args`.
    """
    shared = of_replicas(options)
    chosen = options if rank is None else {"rank": rank, **options}
    config = Config.of(method, chosen, model=True, facts=model_facts(model))
    warn_of_rank(config, chosen)
    given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
    values = {**hyperparameters(args), **{key: value for key, value in given.items() if value is not None}}
    if args is not None:
        own = {key: config.options[key] for key in ("max_grad_norm",) if key in chosen}
        config = taken_over(args, config, method).with_(**own)
    return OfAPair, {**keywords_of(model, config, values, target_modules), **shared, "of": model}


class OfAPair(AskedWithoutModel):
    """What `optimizer_cls_and_kwargs` returns: Trainer takes the groups out of a pair as it uses it."""

    without = (
        "no group says which matrices get a subspace: the pair of optimizer_cls_and_kwargs has been used, and Trainer "
        "takes the groups out of it. Ask for a new one, for the model that is trained"
    )

    def __init__(
        self, params: Iterable[Any], *args: Any, of: nn.Module, shard_state: bool = False, **kwargs: Any
    ) -> None:
        """Make it for a model, as Trainer does on all processes before DistributedDataParallel wraps that."""
        shard_state = shard_state and replicas() is not None
        if shard_state and not gathers_before_saving():
            raise ValueError(
                "shard_state: a Trainer of which nothing is replaced asks one process for the state, which holds a "
                "part: call hf_lowrank.register() before training, which gathers the state before it is saved"
            )
        super().__init__(params, *args, shard_state=shard_state, **kwargs)
        self.agree_on_options()
        if not any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
            exclude_from_ddp(of, self)


def gathers_before_saving() -> bool:
    """Tell whether Trainer's saving has been replaced by `checkpoints.with_sums`."""
    return hasattr(Trainer._save_optimizer_and_scheduler, "__wrapped__")
