"""Hooks that take a matrix's gradient during backward, so that it can be freed before the next one comes."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


if TYPE_CHECKING:
    from hf_lowrank.optimizer import LowRankOptimizer

_HOOK = "_hf_lowrank_hook"
"""Attribute of a parameter: (reference to the optimizer, handle) of the hook it has from us."""


def register_hooks(optimizer: LowRankOptimizer) -> None:
    """Give every matrix of a layerwise group a hook, in place of one that another optimizer of ours left there.

    The hook holds no reference that would keep the optimizer alive.

    Raises:
        ValueError: under DistributedDataParallel, whose reduction comes after the hooks.
    """
    for g, group in enumerate(optimizer.param_groups):
        if not (group["layerwise"] and "rank" in group):
            continue
        for i, p in enumerate(group["params"]):
            known = getattr(p, _HOOK, None)
            if known is not None and known[0]() is optimizer:
                continue
            if known is not None:
                known[1].remove()
            _refuse_replicas(p)
            mine = weakref.ref(optimizer)
            setattr(p, _HOOK, (mine, p.register_post_accumulate_grad_hook(partial(_on_gradient, mine, g, i))))


def _on_gradient(owner: weakref.ref[LowRankOptimizer], g: int, i: int, p: Tensor) -> None:
    """Hand the gradient over, unless the optimizer is gone or its group has been changed."""
    optimizer = owner()
    if optimizer is not None and p.grad is not None and optimizer.param_groups[g]["params"][i] is p:
        optimizer.take_gradient(g, i, p)


def _refuse_replicas(p: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not isinstance(p, DTensor):
        raise ValueError(
            "layerwise does not run under DistributedDataParallel, which reduces gradients after they are freed: "
            "use FSDP2, or leave out layerwise"
        )
