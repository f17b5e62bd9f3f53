"""The optimizers in torchtitan: `config.optimizer = LowRankContainer.Config(method="galore_i3s_adamw", lr=1e-2)`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torchtitan.components.optimizer import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
    OptimizersContainer,
)

from hf_lowrank.groups import param_groups
from hf_lowrank.optimizer import LowRankOptimizer


class LowRankContainer(OptimizersContainer):  # type: ignore[misc,unused-ignore]
    """One LowRankOptimizer for each part of the model that this process holds (several under pipeline parallelism).

    The parts are split as `param_groups` does, in the place of torchtitan's patterns. Schedules, clipping, FSDP2 and
    torchtitan's distributed checkpoints go by the container and find nothing new.

    Raises:
        ValueError: for an unknown method or option, a part in which nothing can be projected, names in `_layerwise`,
            and `param_groups`, which would name another optimizer.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc,unused-ignore]
        """What a torchtitan configuration has in its field `optimizer`.

        Attributes:
            method: a name from METHODS.
            lr, betas, eps, weight_decay: of every group; the defaults are torchtitan's own for AdamW.
            seed: of the private generators.
            options: of the method, as `param_groups` takes them: rank, update_proj_gap, target_modules, ...
        """

        method: str = "galore_i3s_adamw"
        lr: float = 8e-4
        betas: tuple[float, float] = (0.9, 0.95)
        eps: float = 1e-8
        weight_decay: float = 0.1
        seed: int = 0
        options: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        if config.param_groups or config.optimizer_factory_kwargs_by_name:
            raise ValueError("param_groups names torchtitan's own optimizers; use method, lr and options")
        self.model_parts = model_parts
        self.optimizers = [_built(config, part) for part in model_parts]
        parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        self._post_init(parameters)


def _built(config: LowRankContainer.Config, part: nn.Module) -> LowRankOptimizer:
    """Return the optimizer of one part of the model."""
    groups = param_groups(part, method=config.method, weight_decay=config.weight_decay, **config.options)
    optimizer = LowRankOptimizer(
        groups, config.method, lr=config.lr, betas=config.betas, eps=config.eps, seed=config.seed
    )
    if any(group["layerwise"] for group in optimizer.param_groups):
        raise ValueError(
            f"{config.method}: torchtitan clips whole gradients, which the layerwise mode has freed by then; use the "
            "name without _layerwise"
        )
    return optimizer
