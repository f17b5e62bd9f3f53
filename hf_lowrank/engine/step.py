"""The step over all units of work: refreshes shared out over processes, clipping, updates in buckets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowrank.engine import collectives, schedule
from hf_lowrank.engine.dense import DenseStep
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.engine.refresh import Refresh
from hf_lowrank.tensors import kernels


SYNC_ELEMENTS = 2**26
"""Elements of projected gradients in one bucket on an accelerator, where many matrices share one finite check. Their
moments, if decoded, and directions come on top."""

Unit = MatrixStep | DenseStep


def refresh_(due: Sequence[MatrixStep], *, share: bool) -> int:
    """Choose new bases, each on one process where the work is shared, and carry the moments over.

    Returns:
        How many this process chose.
    """
    here = 0
    for mesh in dict.fromkeys(unit.mesh for unit in due):
        # the costliest first, so that processes that work at the same time have as much to do
        units = sorted((unit for unit in due if unit.mesh == mesh), key=lambda unit: -unit.cost)
        rank, world = team(mesh, share=share)
        group = None if world == 1 else group_of(mesh)
        owner = schedule.owners([unit.cost for unit in units], world)
        for wave in schedule.waves(units, owner):
            refreshes = [Refresh(unit, chooser) for unit, chooser in wave]
            collectives.together([refresh.collect_() for refresh in refreshes], group)
            for refresh in refreshes:
                if refresh.owner == rank:
                    refresh.choose_()
                    here += 1
            for refresh in refreshes:
                refresh.adopt_(group)
    return here


def update_(work: Sequence[Unit]) -> None:
    """Update moments and weights; under FSDP2 all flags travel in one collective, and so do all sums of a round."""
    for bucket in _buckets(work):
        mesh = bucket[0].mesh
        group = None if mesh is None else mesh.get_group()
        readings = collectives.together([unit.measure() for unit in bucket], group)
        flags = kernels.all_finite([x for reading in readings for x in reading])
        if group is not None:
            flags = collectives.all_true(flags, group, bucket[0].device)
        finite = iter(flags)
        shares = [[next(finite) for _ in reading] for reading in readings]
        del readings  # so that its memory is used again at once
        collectives.together([unit.step_(share) for unit, share in zip(bucket, shares, strict=True)], group)


def clip_(work: Sequence[Unit], max_norm: float) -> float:
    """Scale all gradients by the global norm of the projected ones and of the dense ones, and return that norm.

    For methods whose step depends on the projected gradient alone this is exact clipping of what they see.
    """
    total, readings = 0.0, list[Tensor]()
    for mesh in dict.fromkeys(unit.mesh for unit in work):
        group = None if mesh is None else mesh.get_group()
        units = [unit.measure() for unit in work if unit.mesh == mesh]
        some = [x for reading in collectives.together(units, group) for x in reading]
        finite = kernels.all_finite(some)  # one that is not skips its parameter, and counts for nothing here
        squares = [kernels.sum_of_squares(x).double() for x, good in zip(some, finite, strict=True) if good]
        device = some[0].device
        share = sum((square.to(device) for square in squares), torch.zeros((), device=device))
        if group is not None:
            (share,) = collectives.sum_together([share.double()], group)
        total += float(share)
        readings += some
    norm: float = total**0.5
    for x in readings:
        x.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


def team(mesh: Any, *, share: bool) -> tuple[int, int]:
    """Return (rank, world size) of the processes that share the refreshes of a weight on this mesh."""
    if mesh is None and not share:
        return 0, 1
    group = group_of(mesh)
    return dist.get_rank(group), dist.get_world_size(group)


def group_of(mesh: Any) -> Any:
    """Return the processes of a mesh, or all of them."""
    return dist.group.WORLD if mesh is None else mesh.get_group()


def _buckets(work: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Split the work: one unit at a time on the CPU, as many as SYNC_ELEMENTS allow where a finite check makes the
    host wait or processes talk.
    """
    bucket: list[Unit] = []
    for unit in work:
        if bucket and unit.mesh != bucket[0].mesh:
            yield bucket
            bucket = []
        bucket.append(unit)
        alone = unit.device.type == "cpu" and unit.mesh is None
        if alone or sum(x.transient for x in bucket) >= SYNC_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
