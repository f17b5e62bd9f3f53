"""How the state of a parameter is split over processes, and saved state taken over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.engine import refusals
from hf_lowrank.engine.collectives import replicas
from hf_lowrank.engine.matrix import reduces
from hf_lowrank.engine.plan import Plan, split_axes
from hf_lowrank.methods.resolve import Config
from hf_lowrank.state import view
from hf_lowrank.state.slots import Stored
from hf_lowrank.tensors.layout import Layout, local
from hf_lowrank.tensors.splits import sharded, splits


def allocate(weight: Tensor, plan: Plan, *, trained: bool = True) -> Stored:
    """Return freshly initialised state: DTensors where the axis that is split over processes runs through it.

    Args:
        weight: the parameter.
        plan: its plan.
        trained: False for what there is of a parameter that is not trained now.
    """
    stored = view.allocate(plan.buffers if trained else plan.lasting, plan.encodings, local(weight))
    if not isinstance(weight, DTensor):
        return stored
    return {key: sharded(tensor, split_axes(weight, plan, key)) for key, tensor in stored.items()}


def adopt(saved: Tensor, fresh: Tensor) -> Tensor:
    """Return a saved state tensor as this process wants it: its type kept, on the right device, split like `fresh`."""
    if isinstance(fresh, DTensor) and not isinstance(saved, DTensor):  # a checkpoint of an unsharded run
        for axis, split in splits(fresh).items():
            saved = saved.narrow(axis, split.start, split.length)
        fresh.to_local().copy_(saved)
        return fresh
    # the device that trains has no room for two of them: what lies there already is taken over
    tensor = saved.detach().to(fresh.device, copy=saved.device.type == "cpu")
    here, wanted = local(tensor), local(fresh)
    if here.stride() == wanted.stride() or here.shape != wanted.shape:
        return tensor
    wanted.copy_(here)  # sums over what lies in another order would differ in their last bits
    return fresh


def whole_if_needed(saved: Any, weight: Tensor) -> Any:
    """Return a saved tensor, as a whole where the checkpoint of a sharded run meets a weight that is not sharded."""
    return saved.full_tensor() if isinstance(saved, DTensor) and not isinstance(weight, DTensor) else saved


def check_weight(name: str, weight: Tensor, config: Config) -> None:
    """Refuse a sharded weight that cannot be trained so.

    Args:
        name: what the weight is called.
        weight: the parameter.
        config: its method and options.

    Raises:
        ValueError: naming the way out.
    """
    if not isinstance(weight, DTensor):
        return
    try:
        axes = splits(weight)
    except ValueError as error:
        raise ValueError(f"parameter {name}: {error}") from None
    if weight.device.type not in (weight.device_mesh.device_type, "meta"):
        raise ValueError(
            f"parameter {name} lies on the {weight.device.type} while its mesh is on {weight.device_mesh.device_type} "
            "(CPUOffloadPolicy), where its sharded state would lie: leave out the offload policy"
        )
    layout = Layout.of(weight, config.options["proj_type"]) if config.by_matrix else None
    if reason := refusals.of_shards(config) or refusals.of_shard(name, config, axes.keys(), layout):
        raise ValueError(reason)


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
            continue
        excluded = getattr(p, "_ddp_ignored", False)
        if reason := refusals.of_replicas(config):
            raise ValueError(
                f"{config.method} does not run where every process keeps a whole weight, as under "
                f"DistributedDataParallel (one of shape {tuple(p.shape)} does): {reason}"
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
