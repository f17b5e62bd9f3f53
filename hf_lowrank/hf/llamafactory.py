"""The optimizers in LLaMA-Factory v1: `register()`, then `optim_config: {name: galore_i3s_adamw, lr: 0.01}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from llamafactory.v1.plugins.trainer_plugins.optimizer import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    OptimizerPlugin,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_lowrank.hf.pair import optimizer_cls_and_kwargs
from hf_lowrank.methods import resolve
from hf_lowrank.optimizer import LowRankOptimizer


_registered: set[str] = set()


def register() -> None:
    """Make every method a `name` of `optim_config`; HF_LOWRANK_AUTOLOAD=1 calls it. Twice is the same as once."""
    for name in set(resolve.names()) - _registered:
        OptimizerPlugin(name).register()(build)
        _registered.add(name)


def build(model: nn.Module, config: Mapping[str, Any]) -> LowRankOptimizer:
    """Return the optimizer that LLaMA-Factory's trainers ask for.

    Args:
        model: the model as it is trained, DDP's or FSDP2's wrapper included.
        config: `optim_config`: name, lr, and what else `optimizer_cls_and_kwargs` takes.

    Raises:
        ValueError: without a learning rate, for names in `_layerwise`, under DeepSpeed, and for an unknown option.
    """
    name, options = config["name"], {key: value for key, value in config.items() if key != "name"}
    if "lr" not in options:
        raise ValueError("optim_config needs lr: LLaMA-Factory hands no learning_rate to an optimizer that it names")
    if AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED:
        raise ValueError(
            f"{name} does not run under DeepSpeed: ZeRO flattens the matrices that are projected; use "
            "dist_config: {name: fsdp2}, or none for DDP"
        )
    cls, keywords = optimizer_cls_and_kwargs(model, name, **options)
    optimizer = cls(**keywords, share_refreshes=isinstance(model, DistributedDataParallel))
    if any(group["layerwise"] for group in optimizer.param_groups):
        raise ValueError(
            f"{name}: LLaMA-Factory clips whole gradients, which the layerwise mode has freed by then; use the name "
            "without _layerwise"
        )
    return optimizer
