"""Sharded state: every parameter has an owner among the processes of DistributedDataParallel.

The owner keeps its state, refreshes it and steps it, and then sends the weight to all. What the others know of its
gradient decides nothing, and no process waits for another but for its weights, and for its share of
a norm that is clipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.engine import refusals
from hf_lowrank.engine.collectives import broadcast_, buckets, hand_over_
from hf_lowrank.engine.schedule import owners
from hf_lowrank.engine.work import Declared
from hf_lowrank.state import view
from hf_lowrank.state.slots import Stored


BUCKET_BYTES = 2**25
"""Bytes of the small weights that travel together. A larger one travels alone, from where it lies."""


class Owners:
    """Which process owns every parameter: by the bytes of state, the largest first, to the one with the least so far.

    All processes find the same, and a parameter that has an owner keeps it when others are added.
    """

    def __init__(self) -> None:
        self._owner: dict[Tensor, int] = {}

    def of(self, known: Sequence[Declared]) -> dict[Tensor, int]:
        """Return the owner of every parameter: the one that it has, or would get."""
        before = {i: self._owner[one.weight] for i, one in enumerate(known) if one.weight in self._owner}
        found = owners([float(one.plan.nbytes) for one in known], dist.get_world_size(), before)
        return {one.weight: owner for one, owner in zip(known, found, strict=True)}

    def take(self, known: Sequence[Declared]) -> None:
        """Give the parameters that have no owner one; all processes call this at the same point of the run."""
        self._owner = self.of(known)

    def taken(self, known: Sequence[Declared], states: Iterable[tuple[Tensor, Stored]]) -> dict[Tensor, Stored]:
        """Return of the states of all parameters those of which this process is the owner; all call this."""
        owner = self.of(known)
        found = {p: state if owner[p] == dist.get_rank() else {} for p, state in states}
        if found:
            self.take(known)
        return {p: state for p, state in found.items() if state}

    @property
    def begun(self) -> bool:
        """Whether there are parameters that have an owner, and so a state."""
        return bool(self._owner)

    def here(self, p: Tensor) -> bool:
        """Tell whether this process owns a parameter."""
        return self._owner[p] == dist.get_rank()

    def send_(self, weights: Iterable[Tensor]) -> None:
        """Send every weight from its owner to all, in place."""
        together: dict[Any, list[Tensor]] = {}
        for p in weights:
            together.setdefault((self._owner[p], p.dtype, p.device), []).append(p.detach())
        for (owner, *_), some in together.items():
            for bucket in buckets(some, lambda p: p.numel() * p.element_size(), BUCKET_BYTES):
                broadcast_(bucket, owner, dist.group.WORLD)

    def summed(self, part: float) -> float:
        """Return the sum over all processes of what each found for the parameters that it owns."""
        total = torch.tensor([part], dtype=torch.float64, device=next(iter(self._owner)).device)
        dist.all_reduce(total)
        return float(total)

    def gathered(
        self, known: Sequence[Declared], state: Mapping[Tensor, Stored], to: int
    ) -> dict[Tensor, Stored] | None:
        """Return the state of all parameters in their order, on the CPU of one process; None on the others.

        Args:
            known: all parameters.
            state: that of those which this process owns.
            to: the process that is to have it.
        """
        whole, rank = dict[Tensor, Stored](), dist.get_rank()
        for (_, p, _, plan), asleep in zip(known, self._asleep(known, state), strict=True):
            owner = self._owner[p]
            if rank == to:
                whole[p] = view.allocate(
                    plan.lasting if asleep else plan.buffers, plan.encodings, torch.empty(0, device="cpu")
                )
            if owner == rank == to:
                for name, tensor in state[p].items():
                    whole[p][name].copy_(tensor)
            elif rank in (owner, to):
                hand_over_([*(state if rank == owner else whole)[p].values()], owner, to, p.device)
        return whole if rank == to else None

    def _asleep(self, known: Sequence[Declared], state: Mapping[Tensor, Stored]) -> list[bool]:
        """Tell of all parameters which have counters alone, because they are not trained: what their owners say."""
        here = [p in state and state[p].keys() <= plan.lasting.keys() for _, p, _, plan in known]
        flags = torch.tensor(here, dtype=torch.int32, device=next(iter(self._owner)).device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]


def check_shardable(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what does not go together with sharded state.

    Raises:
        ValueError: for weights that are sharded themselves, for the layerwise mode, and for projected all-reduces.
    """
    if any(isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise ValueError(
            "shard_state is for DistributedDataParallel, where every process has all weights: leave it out where "
            "weights are sharded (FSDP2), for their state is sharded too"
        )
    for group in groups:
        if reason := refusals.of_owners(group):
            raise ValueError(reason)
