"""Hooks that take a matrix's gradient during backward, so that it can be freed before the next one comes."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary


if TYPE_CHECKING:
    from hf_lowrank.optimizer import LowRankOptimizer


_hooks: MutableMapping[Tensor, tuple[weakref.ref[LowRankOptimizer], Any]] = WeakIdKeyDictionary()
"""By parameter: (reference to the optimizer, handle) of the hook it has from us."""


def register_hooks(optimizer: LowRankOptimizer) -> None:
    """Give every matrix of a layerwise group a hook; remove those that another optimizer of ours left on its
    parameters.

    A hook holds no reference that would keep the optimizer alive.

    Raises:
        ValueError: under DistributedDataParallel, whose reduction comes after the hooks.
    """
    for g, group in enumerate(optimizer.param_groups):
        wanted = group["layerwise"] and "rank" in group
        for i, p in enumerate(group["params"]):
            owner, handle = _hooks.get(p, (None, None))
            if owner is not None and owner() is optimizer:
                continue
            if handle is not None:
                handle.remove()
                del _hooks[p]
            if wanted:
                _refuse_replicas(p)
                mine = weakref.ref(optimizer)
                _hooks[p] = mine, p.register_post_accumulate_grad_hook(partial(_on_gradient, mine, g, i))


def remove_hooks(optimizer: LowRankOptimizer) -> None:
    """Take the hooks off again, so that another optimizer finds the gradients."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            owner, handle = _hooks.get(p, (None, None))
            if owner is not None and handle is not None and owner() is optimizer:
                handle.remove()
                del _hooks[p]


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
