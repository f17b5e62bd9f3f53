"""How the state of a parameter is split over processes, and saved state taken over."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.engine.plan import Plan, split_axis
from hf_lowrank.methods.resolve import Config
from hf_lowrank.state import view
from hf_lowrank.state.slots import Stored
from hf_lowrank.tensors.layout import check_sharding, chunks, local, sharded


def allocate(weight: Tensor, plan: Plan) -> Stored:
    """Return freshly initialised state: DTensors where the axis that is split over processes runs through it."""
    stored = view.allocate(plan.buffers, plan.encodings, local(weight))
    if not isinstance(weight, DTensor):
        return stored
    places = {key: split_axis(weight, plan, key) for key in stored}
    return {
        key: tensor if (place := places[key]) is None else sharded(tensor, weight.device_mesh, *place)
        for key, tensor in stored.items()
    }


def adopt(saved: Tensor, fresh: Tensor) -> Tensor:
    """Return a saved state tensor as this process wants it: its type kept, on the right device, split like `fresh`."""
    if isinstance(fresh, DTensor) and not isinstance(saved, DTensor):  # a checkpoint of an unsharded run
        axis = fresh.placements[0].dim  # type: ignore[attr-defined]
        lengths = chunks(fresh.shape[axis], fresh.device_mesh.size())
        rank = fresh.device_mesh.get_local_rank()
        fresh.to_local().copy_(saved.narrow(axis, sum(lengths[:rank]), lengths[rank]))
        return fresh
    # the device that trains has no room for two of them: what lies there already is taken over
    tensor = saved.detach().to(fresh.device, copy=saved.device.type == "cpu")
    return tensor if tensor.stride() == fresh.stride() or isinstance(fresh, DTensor) else fresh.copy_(tensor)


def whole_if_needed(saved: Any, weight: Tensor) -> Any:
    """Return a saved tensor, as a whole where the checkpoint of a sharded run meets a weight that is not sharded."""
    return saved.full_tensor() if isinstance(saved, DTensor) and not isinstance(weight, DTensor) else saved


def check_weight(weight: Tensor, config: Config) -> None:
    """Refuse a sharded weight that cannot be trained so.

    Raises:
        ValueError: naming the way out.
    """
    if not isinstance(weight, DTensor):
        return
    check_sharding(weight)
    if config.options.get("proj_type") == "full":
        raise ValueError("proj_type=full does not run on sharded weights (FSDP2): use DDP, or another proj_type")
