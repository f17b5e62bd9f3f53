"""Which state a parameter has, in which formats, and how it is split over processes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank import state
from hf_lowrank.formats import Raw, Slot, Slots, counter
from hf_lowrank.matrices import Layout, check_sharding, chunks, clamp_rank, local, sharded
from hf_lowrank.methods import Parts
from hf_lowrank.state import Forms


COUNTERS: Slots = {"step": counter(), "moment_step": counter(), "skipped": counter()}
REFRESH: Slots = {
    "refreshes": counter(),
    "refresh_at": counter(),
    "report": Slot((3,), "exact"),  # overlap with the basis before, captured energy, stable rank: of the last refresh
}


def matrix_state(parts: Parts, layout: Layout, group: Mapping[str, Any]) -> tuple[Slots, Forms]:
    """Return the declared state of this process's piece of a low-rank weight, and its formats."""
    r = clamp_rank(group["rank"], layout.m, layout.n)
    return _matrix_state(
        parts, layout.stack, layout.m, layout.columns, r, group["basis_format"], group["state_format"]
    )


@lru_cache(maxsize=4096)
def _matrix_state(
    parts: Parts, stack: tuple[int, ...], m: int, columns: int, r: int, basis: str, moments: str
) -> tuple[Slots, Forms]:
    slots = {
        **parts.subspace.slots(stack, m, columns, r),
        **parts.moments.slots((*stack, r, columns)),
        **parts.reconstruction.slots(stack, m, columns, r),
        **COUNTERS,
        **REFRESH,
    }
    return slots, state.forms(slots, basis=basis, moments=moments)


@lru_cache(maxsize=4096)
def dense_state(parts: Parts, shape: tuple[int, ...], form: str) -> tuple[Slots, Forms]:
    """Return the declared state of a parameter that has no subspace, and its formats."""
    slots = {**parts.moments.slots(shape), **COUNTERS}
    return slots, state.forms(slots, moments=form)


def declared_state(weight: Tensor, parts: Parts, group: Mapping[str, Any]) -> tuple[Slots, Forms]:
    """Return the declared state of this process's piece of any parameter, and its formats."""
    if "rank" in group:
        return matrix_state(parts, Layout.of(weight, group["proj_type"]), group)
    return dense_state(parts, tuple(local(weight).shape), group["dense_state_format"])


def allocate(weight: Tensor, parts: Parts, group: Mapping[str, Any]) -> Raw:
    """Return freshly initialised state: DTensors where the axis that is split over processes runs through it."""
    raw = state.allocate(*declared_state(weight, parts, group), local(weight))
    if not isinstance(weight, DTensor):
        return raw
    return {name: _distribute(weight, parts, group, name, tensor) for name, tensor in raw.items()}


def sharded_axis(weight: DTensor, parts: Parts, group: Mapping[str, Any], name: str) -> tuple[int, int] | None:
    """Return (axis, whole length) along which a state tensor is split over processes, or None if each holds all of it.

    The axis is the one that grows with the split axis of the weight, so parts need not declare it.
    """
    if "rank" not in group:
        grown = [dense_state(parts, (size, *weight.shape[1:]), "fp32")[0] for size in (2, 3)]
        whole = weight.shape[0]
    else:
        layout = Layout.of(weight, group["proj_type"])
        r = clamp_rank(group["rank"], layout.m, layout.n)
        sizes = [
            ((k,), layout.m, layout.n) if layout.along == "batch" else (layout.batch, layout.m, k) for k in (2, 3)
        ]
        grown = [_matrix_state(parts, *size, r, "fp32", "fp32")[0] for size in sizes]
        whole = layout.batch[0] if layout.along == "batch" else layout.n
    pairs = zip(grown[0][name].shape, grown[1][name].shape, strict=True) if name in grown[0] else ()
    return next(((axis, whole) for axis, (a, b) in enumerate(pairs) if a != b), None)


def _distribute(weight: DTensor, parts: Parts, group: Mapping[str, Any], name: str, tensor: Tensor) -> Tensor:
    place = sharded_axis(weight, parts, group, name)
    return tensor if place is None else sharded(tensor, weight.device_mesh, *place)


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
    if {group["basis_format"], group["state_format"], group["dense_state_format"]} != {"fp32"}:
        raise ValueError(
            "states of sharded weights (FSDP2) are kept in fp32: leave out _8bit and the *_format options"
        )
