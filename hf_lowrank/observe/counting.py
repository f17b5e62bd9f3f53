"""The bytes that a process holds for its parameters: each is counted here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod

from torch import Tensor

from hf_lowrank.engine.matrix import transient
from hf_lowrank.engine.plan import projected_bytes
from hf_lowrank.engine.step import SYNC_ELEMENTS
from hf_lowrank.engine.work import Declared
from hf_lowrank.methods.resolve import Config
from hf_lowrank.optimizer import LowRankOptimizer
from hf_lowrank.state.formats import FORMATS
from hf_lowrank.tensors.kernels import BLOCK_ON_DEVICE
from hf_lowrank.tensors.layout import Layout, local


Size = Callable[[Tensor], int]
"""Bytes of one number of a parameter."""

ADAMW_STEP = 4
"""Bytes of the count of steps that torch.optim.AdamW keeps with every parameter, a scalar in fp32."""


SMALL = 2**25
"""Bytes that vectors, scalars and what a rule makes besides may take."""


def own_type(p: Tensor) -> int:
    """Return the bytes of one number of a parameter as it is."""
    return p.element_size()


def weight_bytes(weights: Iterable[Tensor], size: Size = own_type) -> int:
    """Return the bytes of this process's pieces of some parameters, or of their gradients."""
    return sum(size(p) * local(p).numel() for p in weights)


def adamw_bytes(weights: Iterable[Tensor], size: Size = own_type) -> int:
    """Return what torch.optim.AdamW would keep: two moments in the weight's own type, and the count of steps."""
    return sum(2 * weight_bytes([p], size) + ADAMW_STEP for p in weights)


def _trained(declared: Iterable[Declared]) -> Iterator[Declared]:
    """Yield those that require a gradient."""
    return (one for one in declared if one.weight.requires_grad)


def gradient_bytes(declared: Iterable[Declared], size: Size = own_type) -> int:
    """Return the bytes of the gradients that are held at once, at most.

    All of them, at the end of the backward pass. In the layerwise mode a matrix leaves its projected gradient, and
    nothing where the method updates in the hook or the gradient waits in host memory; the largest gradient is there as
    well while it is taken.
    """
    held = largest = 0
    for _, p, config, plan in _trained(declared):
        whole = weight_bytes([p], size)
        if config.hooked:
            largest = max(largest, whole)
            held += 0 if config.parts.needs_gradient or config.offloads else projected_bytes(plan, config)
        else:
            held += whole
    return held + largest


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


def workspace_bytes(declared: Iterable[Declared], size: Size = own_type) -> int:
    """Return what a step allocates for a moment on an accelerator, at most: an ordinary one, or one that refreshes.

    An ordinary step holds what is projected and its direction for two buckets (`engine.step.SYNC_ELEMENTS`), or what
    the rule of moments makes of one, or of the largest matrix where those step by themselves; a basis that is drawn
    again at every step; the halves of the bases of one bucket; three images of the largest matrix where a method looks
    at each of its elements; what is decoded of one matrix and as much again as it is encoded; and the fp32 images of
    one dense tensor, or of a block of it, that its rule makes. A refresh holds the float64 copy of a gradient, its
    Gram matrices, the eigenvectors and what the library works in, and the new bases of a wave; with `async_refresh`
    also the gradients that are being decomposed: two, or all where refreshes are not spread.
    """
    held = stacked = images = drawn = bases = whole = dense = decomposed = coded = copied = largest = 0
    for _, p, config, plan in _trained(declared):
        low, block = size(p) < 4, min(local(p).numel(), BLOCK_ON_DEVICE)
        encoded = [plan.buffers[name].numel for name, form in plan.encodings.items() if form is not FORMATS["fp32"]]
        if plan.layout is None:
            rule = config.dense_rule
            length = block if rule.elementwise and (low or encoded) else local(p).numel()
            dense = max(dense, 4 * (2 * low + rule.images + 2 * len(encoded)) * length)
            continue
        here = transient(plan, config)
        held += here
        largest, images = max(largest, here), max(images, 2 + low + config.parts.moments.images)
        stacked += 0 if config.parts.subspace.whole else here
        if here > plan.r * plan.layout.n:
            whole = max(whole, 3 * 4 * local(p).numel())
        coded = max(coded, 2 * 4 * sum(encoded))
        own = sum(buffer.numel for buffer in plan.buffers.values() if buffer.slot.lifetime == "basis")
        bases += own
        if own:
            decomposed = max(decomposed, _decomposed(plan.layout, config, block))
            if config.options.get("async_refresh"):
                image = 4 * local(p).numel()
                copied = max(copied, 2 * image) if config.options["stagger"] else copied + image
        elif not config.parts.subspace.whole:
            drawn = max(drawn, 4 * 4 * plan.layout.m * plan.r)
    new = 4 * min(bases, SYNC_ELEMENTS)
    of_rule = 4 * images * max(largest, min(stacked, SYNC_ELEMENTS))
    ordinary = max(2 * 4 * min(held, 2 * SYNC_ELEMENTS), of_rule) + drawn + new + whole + coded
    return SMALL + max(ordinary, dense, decomposed + new) + copied


def _decomposed(layout: Layout, config: Config, block: int) -> int:
    """Return what the refresh of one matrix, or stack of them, works in, in float64.

    Args:
        layout: how it lies.
        config: its method and options.
        block: elements that are cast at a time.
    """
    count, options = prod(layout.stack), config.options
    sides = layout.m**2 + (layout.n**2 if options.get("proj_type") == "full" else 0)
    whole = 3 * count * layout.m * layout.n if options.get("refresh") == "svd" else 0
    return 8 * (max(block, whole) + 6 * count * sides)


def component_bytes(optimizer: LowRankOptimizer, model_weights: Iterable[Tensor]) -> dict[str, int]:
    """Return what this process holds of weights, gradients and state, and what AdamW would hold.

    Args:
        optimizer: the optimizer.
        model_weights: all parameters of the model, frozen ones too.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    low_rank, dense = state_bytes(optimizer.kept())
    return {
        "weights": weight_bytes(model_weights),
        "gradients": gradient_bytes(optimizer.declared()),
        "low_rank_state": low_rank,
        "dense_state": dense,
        "adamw_gradients": weight_bytes(trained),
        "adamw_state": adamw_bytes(trained),
    }
