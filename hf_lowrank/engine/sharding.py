"""How the state of a parameter is split over processes, and saved state taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.engine.plan import _matrix_state, columns_of, declared_state, dense_columns, dense_state, rank_of
from hf_lowrank.methods.resolve import Parts
from hf_lowrank.state import view
from hf_lowrank.state.slots import Raw, Slots
from hf_lowrank.tensors.layout import Layout, check_sharding, chunks, local, sharded


def allocate(weight: Tensor, parts: Parts, group: Mapping[str, Any], name: str = "") -> Raw:
    """Return freshly initialised state: DTensors where the axis that is split over processes runs through it."""
    slots, forms = declared_state(weight, parts, group, name)
    raw = view.allocate(slots, forms, local(weight))
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
        grown = [view.stored(*dense_state(parts, (k, *weight.shape[1:]), "fp32", columns)) for k in (2, 3)]
        return [(grown, weight.shape[0])]
    layout = Layout.of(weight, group["proj_type"])
    r, columns = rank_of(parts, layout, group), columns_of(layout, group, name)
    forms = group.get("basis_format", "fp32"), "fp32"
    m, n, batch = layout.m, layout.n, layout.batch

    def stored(stack: tuple[int, ...], held: int, piece: tuple[int, int]) -> Slots:
        return view.stored(*_matrix_state(parts, (stack, m, held, r), piece, columns, *forms))

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
