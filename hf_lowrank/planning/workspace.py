"""What a step allocates for a moment on an accelerator, and frees again: a bound, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from hf_lowrank.engine.matrix import transient
from hf_lowrank.engine.plan import Plan
from hf_lowrank.engine.step import SYNC_ELEMENTS
from hf_lowrank.engine.work import Declared
from hf_lowrank.methods.resolve import Config
from hf_lowrank.observe.counting import Size, own_type, trained
from hf_lowrank.state.formats import FORMATS
from hf_lowrank.tensors.kernels import BLOCK_ON_DEVICE
from hf_lowrank.tensors.layout import Layout, local


SMALL = 2**25
"""Bytes that vectors, scalars and what a rule makes besides may take."""

FP32, FP64 = 4, 8


@dataclass(frozen=True)
class Working:
    """What the step of one matrix works in.

    Attributes:
        projected: elements of its projected gradient, and of its direction.
        stacked: of these, those that may share a stack with others.
        images: how many fp32 tensors of that size the rule of moments makes at a time.
        whole: bytes of images of the gradient where the method looks at each of its elements.
        coded: bytes of what is decoded, and as much again as it is encoded.
        basis: elements of the basis that is kept.
        drawn: bytes of a basis that is drawn anew at every step.
        refresh: bytes of a refresh.
        copied: bytes of the gradient that a refresh beside the next step keeps.
        spread: whether such refreshes are spread over the steps.
    """

    projected: int
    stacked: int
    images: int
    whole: int
    coded: int
    basis: int
    drawn: int
    refresh: int
    copied: int
    spread: bool


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
    stepped = [*trained(declared)]
    dense = max((_of_dense(one, size) for one in stepped if one.plan.layout is None), default=0)
    matrices = [_of_matrix(one, layout, size) for one in stepped if (layout := one.plan.layout) is not None]
    if not matrices:
        return SMALL + dense
    projected = FP32 * min(sum(one.projected for one in matrices), 2 * SYNC_ELEMENTS)
    bucket = max(max(one.projected for one in matrices), min(sum(one.stacked for one in matrices), SYNC_ELEMENTS))
    rule = FP32 * max(one.images for one in matrices) * bucket
    bases = FP32 * min(sum(one.basis for one in matrices), SYNC_ELEMENTS)
    each: list[int] = [max(getattr(one, part) for one in matrices) for part in ("drawn", "whole", "coded")]
    ordinary = max(2 * projected, rule) + bases + sum(each)
    refresh = max(one.refresh for one in matrices) + bases
    at_once = [one.copied for one in matrices if not one.spread]
    copied = sum(at_once) + 2 * max((one.copied for one in matrices if one.spread), default=0)
    return SMALL + max(ordinary, dense, refresh) + copied


def _of_dense(one: Declared, size: Size) -> int:
    """Return the bytes that the rule of a parameter without a subspace works in."""
    rule, low, coded = one.config.dense_rule, size(one.weight) < FP32, _encoded(one.plan)
    by_blocks = rule.elementwise and (low or coded)
    elements = min(local(one.weight).numel(), BLOCK_ON_DEVICE) if by_blocks else local(one.weight).numel()
    return FP32 * (2 * low + rule.images + 2 * len(coded)) * elements


def _of_matrix(one: Declared, layout: Layout, size: Size) -> Working:
    plan, config, elements = one.plan, one.config, local(one.weight).numel()
    projected, subspace = transient(plan, config), config.parts.subspace
    basis = sum(buffer.numel for buffer in plan.buffers.values() if buffer.slot.lifetime == "basis")
    return Working(
        projected=projected,
        stacked=0 if subspace.whole else projected,
        images=2 + (size(one.weight) < FP32) + config.parts.moments.images,
        whole=3 * FP32 * elements if projected > plan.r * layout.n else 0,
        coded=2 * FP32 * sum(_encoded(plan)),
        basis=basis,
        drawn=0 if basis or subspace.whole else 4 * FP32 * layout.m * plan.r,
        refresh=_of_refresh(layout, config, min(elements, BLOCK_ON_DEVICE)) if basis else 0,
        copied=FP32 * elements if basis and config.options.get("async_refresh") else 0,
        spread=bool(config.options.get("stagger")),
    )


def _encoded(plan: Plan) -> list[int]:
    """Return the elements of every buffer that is kept in codes or in bf16."""
    return [plan.buffers[name].numel for name, form in plan.encodings.items() if form is not FORMATS["fp32"]]


def _of_refresh(layout: Layout, config: Config, block: int) -> int:
    """Return the bytes that the refresh of one matrix, or stack of them, works in, in float64.

    Args:
        layout: how it lies.
        config: its method and options.
        block: elements that are cast at a time.
    """
    count, options = prod(layout.stack), config.options
    sides = layout.m**2 + (layout.n**2 if options.get("proj_type") == "full" else 0)
    whole = 3 * count * layout.m * layout.n if options.get("refresh") == "svd" else 0
    return FP64 * (max(block, whole) + 6 * count * sides)
