"""How a training run is spread over processes, by name; what training refuses has no figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_lowrank.engine.work import Declared
from hf_lowrank.methods import options as opt
from hf_lowrank.methods.common import ReplicaOptions
from hf_lowrank.planning.strategies import Alone, Owned, Replicated, Sharded, Strategy, Tensors


class DoesNotRun(ValueError):
    """A combination that training refuses."""


def check_runs(spread: Strategy, method: str, declared: Iterable[Declared]) -> None:
    """Refuse what training refuses.

    Args:
        spread: how the run is spread over processes.
        method: its name.
        declared: what is known of its parameters.

    Raises:
        DoesNotRun: naming the way out.
    """
    if reason := spread.refusal(declared):
        raise DoesNotRun(f"{method} does not run so under {spread.name}: {reason}")


NAMES = ("ddp", "ddp_sharded", "fsdp2", "hsdp", "tp")
NODE = 8
"""Processes of one machine, over which `hsdp` splits a copy of the model: these, or the next lower divisor."""


def hybrid_shards(gpus: int) -> int:
    """Return over how many processes `hsdp` splits a copy of the model: at most NODE and fewer than all; or 0."""
    return max((n for n in range(2, min(NODE, gpus - 1) + 1) if gpus % n == 0), default=0)


def possible(gpus: int) -> tuple[str, ...]:
    """Return the strategies that so many processes can be divided for."""
    return tuple(name for name in NAMES if name != "hsdp" or hybrid_shards(gpus))


def strategy_of(name: str, gpus: int, net: nn.Module, options: Mapping[str, Any]) -> Strategy:
    """Return a strategy by its name.

    Args:
        name: one of NAMES, or "" for the usual one.
        gpus: processes, of one device each.
        net: the model.
        options: of the optimizer: `shard_state` is looked at.

    Raises:
        ValueError: for a name that is none of these, too few processes, a model that has no plan for it, or
            `shard_state` beside another strategy than DistributedDataParallel.
    """
    if gpus < 1:
        raise ValueError(f"gpus must be at least 1, got {gpus}")
    if name and name not in NAMES:
        raise ValueError(f"strategy must be one of {', '.join(NAMES)}, got {name!r}")
    own = opt.schema(ReplicaOptions)
    sharded = opt.parse("shard_state", options.get("shard_state", False), own, what="optimizer")
    if sharded and name not in ("", "ddp", "ddp_sharded"):
        raise DoesNotRun(f"shard_state is for DistributedDataParallel: leave it out for {name}")
    if gpus == 1:
        if name:
            raise ValueError(f"strategy={name} needs more than one process: set gpus")
        return Alone()
    if name == "fsdp2":
        return Sharded(gpus, gpus)
    if name == "hsdp":
        shards = hybrid_shards(gpus)
        if not shards:
            raise ValueError(f"hsdp splits over some processes and copies to others: {gpus} cannot be divided so")
        return Sharded(gpus, shards)
    if name == "tp":
        plan = getattr(net, "_tp_plan", None) or {}
        if not plan:
            raise ValueError(f"{type(net).__name__} has no plan for tensor parallel training: take fsdp2 or ddp")
        return Tensors(gpus, dict(plan))
    return (Owned if sharded or name == "ddp_sharded" else Replicated)(gpus)
