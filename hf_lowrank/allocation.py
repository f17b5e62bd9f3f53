"""Which state a parameter has, in which formats, and how it is split over processes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank import state
from hf_lowrank.formats import Raw, Slot, Slots, counter
from hf_lowrank.matrices import Layout, check_sharding, chunks, local, sharded
from hf_lowrank.methods import Parts
from hf_lowrank.parts import Columns
from hf_lowrank.state import Forms


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
    return slots, state.forms(slots, basis=basis, moments=moments)


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
    return slots, state.forms(slots, moments=form)


def declared_state(weight: Tensor, parts: Parts, group: Mapping[str, Any], name: str = "") -> tuple[Slots, Forms]:
    """Return the declared state of this process's piece of any parameter, and its formats."""
    if "rank" in group:
        plan = Plan.of(weight, parts, group, name)
        return plan.slots, plan.forms
    return dense_state(
        parts, tuple(local(weight).shape), group["dense_state_format"], dense_columns(tuple(weight.shape))
    )


def allocate(weight: Tensor, parts: Parts, group: Mapping[str, Any], name: str = "") -> Raw:
    """Return freshly initialised state: DTensors where the axis that is split over processes runs through it."""
    slots, forms = declared_state(weight, parts, group, name)
    raw = state.allocate(slots, forms, local(weight))
    if not isinstance(weight, DTensor):
        return raw
    places = {key: sharded_axis(weight, parts, group, name, key) for key in raw}
    return {
        key: tensor if (place := places[key]) is None else sharded(tensor, weight.device_mesh, *place)
        for key, tensor in raw.items()
    }


def sharded_axis(
    weight: DTensor, parts: Parts, group: Mapping[str, Any], name: str, key: str
) -> tuple[int, int] | None:
    """Return (axis, whole length) along which a stored tensor is split over processes, or None if each holds all of
    it.

    The axis is the one that grows with the split axis of the weight, so parts need not declare it.
    """
    for grown, whole in _growths(weight, parts, group, name):
        pairs = zip(grown[0][key].shape, grown[1][key].shape, strict=True) if key in grown[0] else ()
        for axis, (a, b) in enumerate(pairs):
            if a != b:
                return axis, whole
    return None


def _growths(weight: DTensor, parts: Parts, group: Mapping[str, Any], name: str) -> list[tuple[list[Slots], int]]:
    """Return pairs of stored states for two lengths of whatever is split, and the whole length of that."""
    if "rank" not in group:
        columns = dense_columns(tuple(weight.shape))
        grown = [state.stored(*dense_state(parts, (k, *weight.shape[1:]), "fp32", columns)) for k in (2, 3)]
        return [(grown, weight.shape[0])]
    layout = Layout.of(weight, group["proj_type"])
    r, columns = rank_of(parts, layout, group), columns_of(layout, group, name)
    forms = group.get("basis_format", "fp32"), "fp32"
    m, n, batch = layout.m, layout.n, layout.batch

    def stored(stack: tuple[int, ...], held: int, piece: tuple[int, int]) -> Slots:
        return state.stored(*_matrix_state(parts, (stack, m, held, r), piece, columns, *forms))

    if layout.along == "batch":
        return [([stored((k,), n, (m, n)) for k in (2, 3)], batch[0])]
    if layout.along == "columns":
        return [([stored(batch, k, (m, k)) for k in (2, 3)], n)]
    moments = [stored(batch, k, (m, n)) for k in (2, 3)]
    return [(moments, n), ([stored(batch, n, (k, n)) for k in (2, 3)], m)]


def adopt(saved: Tensor, fresh: Tensor) -> Tensor:
    """Return a saved state tensor as this process wants it: its type kept, on the right device, split like `fresh`."""
    if isinstance(fresh, DTensor) and not isinstance(saved, DTensor):  # a checkpoint of an unsharded run
        axis = fresh.placements[0].dim  # type: ignore[attr-defined]
        lengths = chunks(fresh.shape[axis], fresh.device_mesh.size())
        rank = fresh.device_mesh.get_local_rank()
        fresh.to_local().copy_(saved.narrow(axis, sum(lengths[:rank]), lengths[rank]))
        return fresh
    return saved.detach().to(fresh.device, copy=True)


def whole_if_needed(saved: Any, weight: Tensor) -> Any:
    """Return a saved tensor, as a whole where the checkpoint of a sharded run meets a weight that is not sharded."""
    return saved.full_tensor() if isinstance(saved, DTensor) and not isinstance(weight, DTensor) else saved


def check_weight(weight: Tensor, parts: Parts, group: Mapping[str, Any]) -> None:
    """Refuse a sharded weight that cannot be trained so.

    Raises:
        ValueError: naming the way out.
    """
    if not isinstance(weight, DTensor):
        return
    check_sharding(weight)
    if {group["state_format"], group["dense_state_format"]} != {"fp32"}:
        raise ValueError(
            "moments of sharded weights (FSDP2) are kept in fp32: leave out _8bit, state_format and dense_state_format"
        )
    if group.get("proj_type") == "full":
        raise ValueError("proj_type=full does not run on sharded weights (FSDP2): use DDP, or another proj_type")
