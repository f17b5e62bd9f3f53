"""How the state of a parameter is split over processes, and saved state taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.engine.collectives import replicas
from hf_lowrank.engine.matrix import reduces
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
    if {config.options["state_format"], config.options["dense_state_format"]} != {"fp32"}:
        raise ValueError(
            "moments of sharded weights (FSDP2) are kept in fp32: leave out _8bit, state_format and dense_state_format"
        )
    if config.options.get("proj_type") == "full":
        raise ValueError("proj_type=full does not run on sharded weights (FSDP2): use DDP, or another proj_type")


def check_replicas(group: Mapping[str, Any], config: Config) -> None:
    """Refuse weights of which nobody, or not everybody, would have the mean of all gradients.

    Args:
        group: a parameter group.
        config: what it was resolved to.

    Raises:
        ValueError: saying what to call, or what to leave out.
    """
    if replicas() is None:
        return
    for p in group["params"]:
        if isinstance(p, DTensor):
            if config.options.get("reduce_projected"):
                raise ValueError(
                    "reduce_projected is for DistributedDataParallel; where weights are sharded (FSDP2) no whole "
                    "gradient travels between refreshes anyway: leave it out"
                )
            continue
        excluded = getattr(p, "_ddp_ignored", False)
        if config.hooked and not reduces(config):
            raise ValueError(
                f"{config.method} in the layerwise mode does not run under DistributedDataParallel: its step needs "
                "whole gradients, which are gone before they could be averaged: use FSDP2, or leave out layerwise"
            )
        if reduces(config) and not excluded:
            raise ValueError(
                f"{config.method} is to average projected gradients itself (reduce_projected, layerwise): call "
                "hf_lowrank.exclude_from_ddp(model, optimizer) before DistributedDataParallel(model)"
            )
        if excluded and not reduces(config):
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} was excluded from DistributedDataParallel, and nobody "
                "averages its gradients: set reduce_projected=true, or load the model anew"
            )
