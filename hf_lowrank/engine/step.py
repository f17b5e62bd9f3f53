"""The steps of many parameters at once: what they ask is answered together.

A step is a generator. It asks whether what it has read is finite (`Reading`), and for sums over processes
(`tensors.sums.Sum`). One that has been started waits at its reading: the layerwise mode keeps it so until `step`, and
clipping scales what it has read before it is answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.engine import collectives
from hf_lowrank.engine.unit import Asked, Reading, Unit, Work
from hf_lowrank.tensors import kernels
from hf_lowrank.tensors.random import float64, with_float64
from hf_lowrank.tensors.splits import group_of


SYNC_ELEMENTS = 2**26
"""Elements of projected gradients in one bucket on an accelerator, where many matrices share one finite check. Their
moments, if decoded, and directions come on top."""


def at_once(device: torch.device) -> bool:
    """Tell whether the host runs ahead of a device, so that it had better ask little, for much at once."""
    return device.type != "cpu"


LARGEST = torch.finfo(torch.float32).max


def finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Tell which tensors have a finite sum of squares, with one transfer to the host for all of them.

    A sum of squares that overflows counts as not finite: it would overflow the second moment too.
    """
    norms = kernels.norms(tensors)
    if len(norms) == 1:
        return [squares_fit(float(norms[0]))]
    together = [norm.float().to(norms[0].device) for norm in norms]
    return [squares_fit(norm) for norm in torch.stack(together).tolist()] if together else []


def squares_fit(norm: float) -> bool:
    """Tell whether the sum of squares is a finite number in fp32."""
    return isfinite(norm) and norm * norm < LARGEST


def start(units: Sequence[Unit]) -> list[Tensor]:
    """Start the steps that have not been: of units on one mesh. Return what all have read, which may be changed."""
    fresh = [unit for unit in units if unit.started is None]
    work = [unit.step_() for unit in fresh]
    for unit, step, reading in zip(fresh, work, advance(work, [None] * len(work)), strict=True):
        assert reading is not None
        unit.started = step, reading
    return [x for unit in units if unit.started for x in unit.started[1].tensors]


def run(units: Sequence[Unit], known: Mapping[Unit, list[bool]]) -> None:
    """Make the steps of units on one mesh: all flags travel in one collective, and so do all sums of a round.

    Args:
        units: what to step.
        known: answers to the readings of some of them.
    """
    start(units)
    units = averaged(units)
    asked = [x for unit in units if unit.started and unit not in known for x in unit.started[1].tensors]
    flags = iter(agreed(finite(asked), units))
    del asked
    work, answers = [], []
    for unit in units:
        assert unit.started is not None
        step, reading = unit.started
        unit.started = None  # so that the memory of the reading is used again at once
        work.append(step)
        answers.append(known[unit] if unit in known else [next(flags) for _ in reading.tensors])
        del reading
    advance(work, answers)


def averaged(units: Sequence[Unit]) -> list[Unit]:
    """Average over the replicas what steps have read of gradients of their own: in one collective.

    Returns:
        All units but those of which no process has a gradient; their steps are dropped.
    """
    own = [(unit, *unit.started) for unit in units if unit.started and unit.started[1].here is not None]
    if not own:
        return list(units)
    readings, here = [reading.tensors[0] for *_, reading in own], [bool(reading.here) for *_, reading in own]
    for (unit, work, reading), anywhere in zip(
        own, collectives.mean_(readings, here, collectives.replicas()), strict=True
    ):
        unit.started = (work, Reading(reading.tensors)) if anywhere else None
    return [unit for unit in units if unit.started]


def agreed(flags: list[bool], units: Sequence[Unit]) -> list[bool]:
    """Return flags that hold on every process over which the units are split."""
    group = group_of(units[0].mesh) if units else None
    return flags if group is None or not flags else collectives.all_true(flags, group, units[0].device)


def foreseen(work: Sequence[Unit]) -> dict[Unit, list[bool]]:
    """Return the answers to the readings of all steps on an accelerator that have not been started.

    There the host must not wait once a bucket: all gradients are looked at before the first of them is projected.
    (What is projected is finite if they are, and their sum of squares no larger.)
    """
    fresh = [unit for unit in work if unit.started is None and not unit.local and at_once(unit.device)]
    known: dict[Unit, list[bool]] = {}
    for mesh in dict.fromkeys(unit.mesh for unit in fresh):
        units = [unit for unit in fresh if unit.mesh == mesh]
        looked = [unit.look() for unit in units]
        flags = iter(agreed(finite([x for some in looked for x in some]), units))
        known |= {unit: [next(flags) for _ in some] for unit, some in zip(units, looked, strict=True)}
    return known


def advance(work: Sequence[Work[Any]], answers: Sequence[Any]) -> list[Reading | None]:
    """Send every step its answer, and go on until it asks for a reading or ends; sums of a round over the same
    processes travel together."""
    readings: list[Reading | None] = [None] * len(work)
    pending = dict(enumerate(answers))
    while pending:
        round_: dict[int, Asked] = {}
        for i, answer in pending.items():
            try:
                asked = work[i].send(answer)
            except StopIteration:
                continue
            if isinstance(asked, Reading):
                readings[i] = asked
            else:
                round_[i] = asked
        pending = dict.fromkeys(round_)
        for team in dict.fromkeys(asked.team for asked in round_.values()):
            some = {i: asked.request for i, asked in round_.items() if asked.team == team}
            pending |= zip(some, collectives.answers([*some.values()], team.group), strict=True)
    return readings


def update_(work: Sequence[Unit], known: Mapping[Unit, list[bool]]) -> None:
    """Step all units, in buckets. See `run`."""
    for bucket in _buckets(work):
        run(bucket, known)


def clip_(work: Sequence[Unit], max_norm: float, summed: Callable[[float], float] = float) -> float:
    """Scale all gradients by the global norm of the projected ones and of the dense ones, and return that norm.

    For methods whose step depends on the projected gradient alone this is exact clipping of what they see.

    Args:
        work: what is stepped here.
        max_norm: the norm that the gradients have afterwards, at most.
        summed: adds to a sum of squares that of what is stepped elsewhere.
    """
    total, readings = 0.0, list[Tensor]()
    for mesh in dict.fromkeys(unit.mesh for unit in work):
        units = [unit for unit in work if unit.mesh == mesh]
        start(units)
        for bucket in _buckets(units):
            averaged(bucket)
    for pieces, mesh in dict.fromkeys((unit.pieces, unit.mesh) for unit in work):  # what is copied counts once
        held = [unit for unit in work if (unit.pieces, unit.mesh) == (pieces, mesh) and unit.started]
        some = [x for unit in held if unit.started for x in unit.started[1].tensors]
        if not some:
            continue
        good = agreed(finite(some), held)  # one that is not skips its parameter, and counts for nothing here
        squares = [float64(kernels.sum_of_squares(x)) for x, taken in zip(some, good, strict=True) if taken]
        device = with_float64(some[0].device)
        share = sum((square.to(device) for square in squares), torch.zeros((), dtype=torch.float64, device=device))
        if pieces is not None:
            (share,) = collectives.sum_together([share], pieces.group)
        total += float(share)
        readings += some
    norm: float = summed(total) ** 0.5
    factor = min(1.0, max_norm / (norm + 1e-6))
    for x in readings if factor < 1.0 else ():
        x.mul_(factor)
    return norm


def _buckets(work: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Split the work: one unit at a time on the CPU, as many as SYNC_ELEMENTS allow where a finite check makes the
    host wait or processes talk. What replicas average has buckets of its own, the same on all of them.
    """
    bucket: list[Unit] = []
    size = 0
    for unit in work:
        if bucket and (unit.mesh, unit.local) != (bucket[0].mesh, bucket[0].local):
            yield bucket
            bucket, size = [], 0
        bucket.append(unit)
        size += unit.transient
        alone = unit.mesh is None and not unit.local and not at_once(unit.device)
        if alone or size >= SYNC_ELEMENTS:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket
