"""Whether all processes are about to do the same: what differs is found before one of them waits for the others.

Every check is one collective of two numbers, whatever the data of a process; only where they differ, which all
processes know then, does another one find out where.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.engine.collectives import replicas
from hf_lowrank.engine.work import Declared, Work
from hf_lowrank.tensors.splits import group_of


LOOKED_AT = 8
"""Numbers of every weight that are compared, evenly spaced."""


def same_settings(settings: Sequence[tuple[str, Any]], device: torch.device) -> None:
    """Refuse settings that are not the same on all processes. All of them call this; one alone has nothing to compare.

    Args:
        settings: names and values, in one order everywhere; what differs first is named.
        device: on which processes can exchange numbers.

    Raises:
        ValueError: on all processes, with what is set on two of them.
    """
    group = replicas()
    digests = [_digest(repr(setting).encode()) for setting in settings]
    place = None if group is None else differing(digests, group, device)
    if place is None:
        return
    here = "{}={!r}".format(*settings[place]) if place < len(settings) else "no more"
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, here)
    other = next(process for process, text in enumerate(everywhere) if text != everywhere[0])
    raise ValueError(
        "the processes were not started with the same settings, and would train apart or wait for each other: "
        f"{everywhere[0]} on process 0, {everywhere[other]} on process {other}"
    )


def options_of(groups: Iterable[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """Return all that groups say but for their parameters, the method first; rates as they were before a schedule."""
    found = []
    for group in groups:
        some = {**group, "lr": group.get("initial_lr", group["lr"])}
        keys = sorted(some.keys() - {"params", "param_names", "initial_lr"}, key=lambda key: (key != "method", key))
        found += [(key, some[key]) for key in keys]
    return found


def same_weights(known: Sequence[Declared]) -> None:
    """Refuse parameters that are not the same on all processes: their names, shapes, types and some of their numbers.

    Raises:
        ValueError: on all processes, naming the first parameter that differs.
    """
    plain = [one for one in known if not isinstance(one.weight, DTensor)]
    digests = [
        _digest(repr((name, p.dtype, tuple(p.shape))).encode() + struct.pack(f"<{len(some)}d", *some))
        for (name, p, *_), some in zip(plain, _numbers([one.weight for one in plain]), strict=True)
    ]
    place = differing(digests, dist.group.WORLD, plain[0].weight.device if plain else torch.device("cpu"))
    if place is not None:
        raise ValueError(
            f"{_called(place, (one.name for one in plain))} is not the same on all processes, so what one of them "
            "chooses for it does not fit the others: under pipeline or expert parallelism of your own build the "
            "optimizer with share_refreshes=False and without shard_state, or make the weights DTensors; under "
            "DistributedDataParallel let it send its weights before the first step"
        )


def same_steps(work: Work, *, share: bool) -> None:
    """Refuse to step where processes would not refresh, or exchange, the same.

    Args:
        work: the steps of all parameters.
        share: whether the processes of DistributedDataParallel share the refreshes.

    Raises:
        ValueError: on all processes, naming the first parameter that differs.
    """
    for mesh in dict.fromkeys(unit.mesh for unit in work.units):
        units = [unit for unit in work.units if unit.mesh == mesh]
        group = group_of(mesh, share=share)
        if group is None:
            continue
        place = differing([mark for unit in units for mark in unit.marks()], group, units[0].device)
        if place is not None:
            names = (name for unit in units for name in work.names[unit])
            raise ValueError(
                f"{_called(place, names)} has a gradient on some processes only, or has skipped steps on some only (a "
                "gradient that was not finite), so they have come apart: reduce gradients over the processes before "
                "step(), as DistributedDataParallel and FSDP2 do, and change none on one process alone"
            )


def differing(numbers: Sequence[int], group: Any, device: torch.device) -> int | None:
    """Return the first place where the processes of a group do not have the same number, or None; on all the same."""
    if dist.get_world_size(group) == 1:
        return None
    if _same([_digest(struct.pack(f"<{len(numbers)}q", *numbers))], group, device) is None:
        return None
    (longest,) = _largest([len(numbers)], group, device)
    return _same([*numbers, *[-1] * (longest - len(numbers))], group, device)


def _digest(data: bytes) -> int:
    """Return 63 bits of a hash."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def _same(numbers: Sequence[int], group: Any, device: torch.device) -> int | None:
    """Return the first place where numbers differ, of as many on every process."""
    found = _largest([*numbers, *(-number for number in numbers)], group, device)
    highest, lowest = found[: len(numbers)], found[len(numbers) :]
    return next((i for i, (a, b) in enumerate(zip(highest, lowest, strict=True)) if a != -b), None)


def _largest(numbers: Sequence[int], group: Any, device: torch.device) -> list[int]:
    together = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MAX, group=group)
    return [int(number) for number in together.tolist()]


def _numbers(weights: Sequence[Tensor]) -> list[list[float]]:
    """Return some numbers of every weight, with one transfer for each device in a row."""
    found = []
    for _, some in groupby(weights, key=lambda p: p.device):
        picked = [p.detach().reshape(-1)[:: max(1, p.numel() // LOOKED_AT)][:LOOKED_AT].float() for p in some]
        values = iter(torch.cat(picked).tolist())
        found += [[next(values) for _ in one] for one in picked]
    return found


def _called(place: int, names: Iterable[str]) -> str:
    """Return what to call the parameter at a place; a process may have fewer than others."""
    name = dict(enumerate(names)).get(place, "")
    return f"parameter {name}" if name else f"parameter {place} of the optimizer"
