"""The bytes that a process holds for its parameters: each is counted here and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from hf_lowrank.engine.plan import projected_bytes
from hf_lowrank.engine.schedule import refresh_cost, staggered_intervals
from hf_lowrank.engine.work import Declared
from hf_lowrank.optimizer import LowRankOptimizer
from hf_lowrank.tensors.layout import local


Size = Callable[[Tensor], int]
"""Bytes of one number of a parameter."""

ADAMW_STEP = 4
"""Bytes of the count of steps that torch.optim.AdamW keeps with every parameter, a scalar in fp32."""


def own_type(p: Tensor) -> int:
    """Return the bytes of one number of a parameter as it is."""
    return p.element_size()


def weight_bytes(weights: Iterable[Tensor], size: Size = own_type) -> int:
    """Return the bytes of this process's pieces of some parameters, or of their gradients."""
    return sum(size(p) * local(p).numel() for p in weights)


def adamw_bytes(weights: Iterable[Tensor], size: Size = own_type) -> int:
    """Return what torch.optim.AdamW would keep: two moments in the weight's own type, and the count of steps."""
    return sum(2 * weight_bytes([p], size) + ADAMW_STEP for p in weights)


def trained(declared: Iterable[Declared]) -> Iterator[Declared]:
    """Yield those that require a gradient."""
    return (one for one in declared if one.weight.requires_grad)


def gradient_bytes(declared: Iterable[Declared], size: Size = own_type) -> int:
    """Return the bytes of the gradients that are held at once, at most.

    All of them, at the end of the backward pass. In the layerwise mode a matrix leaves its projected gradient, and
    nothing where the method updates in the hook or the gradient waits in host memory; the largest gradient is there as
    well while it is taken, and all of those whose refresh is due at one step are kept for it.
    """
    held = largest = 0
    waiting = list[Declared]()
    for one in trained(declared):
        _, p, config, plan = one
        whole = weight_bytes([p], size)
        if not config.hooked:
            held += whole
            continue
        largest = max(largest, whole)
        if not (config.parts.needs_gradient or config.offloads):
            held += projected_bytes(plan, config)
            waiting += [one] if config.low_rank and "update_proj_gap" in config.options else []
    return held + largest + _due_at_once(waiting, size)


def _due_at_once(waiting: Sequence[Declared], size: Size) -> int:
    """Return the bytes of the gradients that wait for refreshes of one step, at most."""
    found = 0
    for gap in {one.config.options["update_proj_gap"] for one in waiting}:
        some = [one for one in waiting if one.config.options["update_proj_gap"] == gap]
        spread = staggered_intervals([refresh_cost(one.weight) for one in some], gap)
        at = Counter[int]()
        for one, first in zip(some, spread, strict=True):
            at[first if one.config.options["stagger"] else 0] += weight_bytes([one.weight], size)
        found += max(at.values())
    return found


def state_bytes(
    declared: Iterable[Declared], count: Callable[[Declared], int] = lambda one: one.nbytes
) -> tuple[int, int]:
    """Return the bytes of this process's state of the matrices that have a subspace, and of everything else."""
    low_rank = dense = 0
    for one in declared:
        if one.config.low_rank:
            low_rank += count(one)
        else:
            dense += count(one)
    return low_rank, dense


def component_bytes(optimizer: LowRankOptimizer, model_weights: Iterable[Tensor]) -> dict[str, int]:
    """Return what this process holds of weights, gradients and state, and what AdamW would hold.

    Args:
        optimizer: the optimizer.
        model_weights: all parameters of the model, frozen ones too.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    low_rank, dense = state_bytes(optimizer.kept())
    return {
        "weights": weight_bytes(model_weights),
        "gradients": gradient_bytes(optimizer.declared()),
        "low_rank_state": low_rank,
        "dense_state": dense,
        "adamw_gradients": weight_bytes(weights),
        "adamw_state": adamw_bytes(weights),
    }
