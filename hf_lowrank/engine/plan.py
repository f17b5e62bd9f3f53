"""Which state a parameter has, in which formats, and how it is split over processes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from hf_lowrank.methods.context import Columns
from hf_lowrank.methods.resolve import Parts
from hf_lowrank.state import view
from hf_lowrank.state.slots import Slot, Slots, counter
from hf_lowrank.state.view import Forms
from hf_lowrank.tensors.layout import Layout, local


COUNTERS: Slots = {"step": counter(), "moment_step": counter(), "skipped": counter()}
REFRESH: Slots = {
    "refreshes": counter(),
    "refresh_at": counter(),
    "report": Slot((3,), "exact"),  # overlap with the basis before, captured energy, stable rank: of the last refresh
}

_ATTENTION = re.compile(r"(^|\.)(q_proj|k_proj|query|key)\.weight$")


def rank_of(parts: Parts, layout: Layout, group: Mapping[str, Any]) -> int:
    """Return the number of rows of R."""
    return parts.subspace.rank(layout.m, layout.n, group["rank"])


def columns_of(layout: Layout, group: Mapping[str, Any], name: str) -> Columns:
    """Return what the columns of R are; a weight is taken as (outputs, inputs)."""
    head = group.get("head_dim", 0)
    per_head = head and layout.n % head == 0 and _ATTENTION.search(name)
    block = (head if per_head else 1) if layout.transposed else 0
    return Columns(layout.n, block, layout.offset if layout.along == "columns" else 0)


@dataclass(frozen=True)
class Plan:
    """What stays the same about a low-rank weight as long as its options do.

    Attributes:
        layout: how it lies.
        columns: what the columns of R are.
        r: how many rows R has.
        slots: the declared state of this process's piece.
        forms: the formats of those.
    """

    layout: Layout
    columns: Columns
    r: int
    slots: Slots
    forms: Forms

    @classmethod
    def of(cls, weight: Tensor, parts: Parts, group: Mapping[str, Any], name: str) -> Plan:
        """Plan for one weight."""
        layout = Layout.of(weight, group["proj_type"])
        columns, r = columns_of(layout, group, name), rank_of(parts, layout, group)
        size = layout.stack, layout.m, layout.columns, r
        formats = group.get("basis_format", "fp32"), group["state_format"]
        return cls(layout, columns, r, *_matrix_state(parts, size, layout.piece, columns, *formats))


@lru_cache(maxsize=4096)
def _matrix_state(
    parts: Parts,
    size: tuple[tuple[int, ...], int, int, int],
    piece: tuple[int, int],
    columns: Columns,
    basis: str,
    moments: str,
) -> tuple[Slots, Forms]:
    stack, m, n, r = size
    slots = {
        **parts.subspace.slots(stack, m, n, r, piece),
        **parts.moments.slots((*stack, *parts.subspace.shape(m, n, r)), columns),
        **parts.reconstruction.slots(stack, m, n, r, piece),
        **COUNTERS,
        **REFRESH,
    }
    return slots, view.forms(slots, basis=basis, moments=moments)


def dense_shape(parts: Parts, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which the moments' rule sees a dense tensor."""
    if parts.moments.dense.elementwise:
        return shape
    if len(shape) < 2:
        return shape or (1,)
    size = 1
    for length in shape[1:]:
        size *= length
    return (size, shape[0])


def dense_columns(shape: tuple[int, ...], offset: int = 0) -> Columns:
    """Return what the columns of a dense tensor are, as a rule that is not elementwise sees it: its first axis."""
    return Columns(shape[0] if shape else 1, 1, offset)


@lru_cache(maxsize=4096)
def dense_state(parts: Parts, shape: tuple[int, ...], form: str, columns: Columns) -> tuple[Slots, Forms]:
    """Return the declared state of a parameter that has no subspace, and its formats."""
    slots = {**parts.moments.dense.slots(dense_shape(parts, shape), columns), **COUNTERS}
    return slots, view.forms(slots, moments=form)


def declared_state(weight: Tensor, parts: Parts, group: Mapping[str, Any], name: str = "") -> tuple[Slots, Forms]:
    """Return the declared state of this process's piece of any parameter, and its formats."""
    if "rank" in group:
        plan = Plan.of(weight, parts, group, name)
        return plan.slots, plan.forms
    return dense_state(
        parts, tuple(local(weight).shape), group["dense_state_format"], dense_columns(tuple(weight.shape))
    )
