"""Replicas that DistributedDataParallel does not reduce: they average what is projected, or gradients to refresh."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hf_lowrank.engine.checks import config_of
from hf_lowrank.engine.collectives import broadcast_, buckets, mean_, replicas
from hf_lowrank.engine.matrix import MatrixStep, reduces
from hf_lowrank.engine.step import SYNC_ELEMENTS


def exclude_from_ddp(model: nn.Module, optimizer: Optimizer) -> None:
    """Have DistributedDataParallel leave the low-rank weights to the optimizer, which averages what it projects.

    For reduce_projected and the layerwise mode. To be called on all processes before the model is wrapped. It makes
    the weights those of process 0, as wrapping does with all others. On one process it does nothing.

    Args:
        model: the model, not wrapped yet, on the device on which it will be trained.
        optimizer: a LowRankOptimizer of its parameters.

    A module inside a wrapper looks like one that is not wrapped: called for it too late (Lightning wraps before
    `configure_optimizers`), both average, which changes nothing but the traffic.

    Raises:
        ValueError: for the wrapper itself or a model of other weights, and where DistributedDataParallel would have
            nothing left to reduce, which it refuses.

    Example:
        >>> optimizer = LowRankOptimizer(param_groups(model, reduce_projected=True), "galore_i3s_adamw")
        >>> exclude_from_ddp(model, optimizer)
        >>> model = DistributedDataParallel(model)
    """
    groups = [group for group in optimizer.param_groups if reduces(config_of(group))]
    exclude_(model, {p for group in groups for p in group["params"]})


def exclude_(model: nn.Module, weights: Collection[Tensor]) -> None:
    """Exclude some weights of a model. See `exclude_from_ddp`."""
    if (group := replicas()) is None or not weights:
        return
    if isinstance(model, DistributedDataParallel):
        raise ValueError("the model is wrapped in DistributedDataParallel already: exclude its weights before that")
    named = list(model.named_parameters(remove_duplicate=False))
    ours = dict.fromkeys(p for _, p in named if p in weights)  # in the model's order, the same on all processes
    if len(ours) < len(weights):
        raise ValueError("the model is not the one whose weights this optimizer trains")
    if not any(p.requires_grad and p not in ours for _, p in named):
        raise ValueError(
            "all parameters that are trained are projected, and DistributedDataParallel wants one to reduce: train a "
            "dense one too (a norm, a bias), or leave out reduce_projected and layerwise"
        )
    names = {name for name, p in named if p in ours}
    names |= {f".{name}" for name in names if "." not in name}  # as it spells a parameter of the outermost module
    before = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        model, sorted({*before, *names})
    )
    for some in buckets((p.detach() for p in ours), Tensor.numel, SYNC_ELEMENTS):
        broadcast_(some, 0, group)


def average_gradients_(units: Sequence[MatrixStep]) -> None:
    """Average the whole gradients of some matrices over the replicas: in few collectives, the same on all processes.

    A process without a gradient takes part with zeros. Where no process has one, none has one afterwards.
    """
    for bucket in buckets(units, lambda unit: unit.weight.numel(), SYNC_ELEMENTS):
        here = [unit.weight.grad is not None for unit in bucket]
        for unit in bucket:
            if unit.weight.grad is None:
                unit.weight.grad = torch.zeros_like(unit.weight)
        grads = [unit.weight.grad for unit in bucket if unit.weight.grad is not None]
        for unit, anywhere in zip(bucket, mean_(grads, here, replicas()), strict=True):
            unit.averaged = anywhere
            if not anywhere:
                unit.weight.grad = None
