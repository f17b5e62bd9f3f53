"""How much memory a training run takes, before it starts: bytes from shapes alone, nothing is allocated.

Weights and optimizer state are exact: the state is what the method's parts declare, which is what the
first step allocates. Activations follow a simple rule, see `activations.activation_bytes`; what a step allocates for a
moment on an accelerator is bounded (`workspace.workspace_bytes`). The context of an accelerator (about 0.5 GB under
CUDA) and fragmentation are not counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lowrank import groups, layer_sampling, modules
from hf_lowrank.engine.known import unsaid
from hf_lowrank.engine.plan import Plan
from hf_lowrank.engine.work import Declared
from hf_lowrank.methods.resolve import Config
from hf_lowrank.observe import counting as bytes_of
from hf_lowrank.observe.units import parse_bytes as parse_bytes
from hf_lowrank.optimizer import LowRankOptimizer
from hf_lowrank.planning.activations import activation_bytes
from hf_lowrank.planning.by_name import check_runs, strategy_of
from hf_lowrank.planning.traffic import Tokens, Traffic
from hf_lowrank.planning.workspace import workspace_bytes


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

AS_MODEL = "model"
"""In the place of a type: every parameter has the one that it has in the model."""

ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Trainer's names of torch's AdamW, estimated for comparison."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one training run on one device.

    Attributes:
        model, optim, rank, batch, seq, dtype, checkpointing, layerwise, options: what was asked for.
        parameters: number of parameters.
        weights: all parameters.
        gradients: all gradients or, layerwise, those of the dense parameters, the projected ones and the largest.
        low_rank_state: optimizer state of the matrices that have a subspace.
        dense_state: optimizer state of everything else.
        activations: what is kept for the backward pass; 0 for a model without a config.
        workspace: what a step allocates for a moment on an accelerator, at most (`workspace.workspace_bytes`).
        gpus, strategy: how many processes there are, and how the run is spread over them: all bytes are those of the
            process that holds most.
        gathered: DDP's buckets of gradients, or layers that FSDP2 has gathered, by a rule of thumb.
        sent: bytes that a process sends in a training step (`traffic.Traffic`).
    """

    model: str
    optim: str
    rank: float | None
    batch: int
    seq: int
    dtype: str
    checkpointing: bool
    layerwise: bool
    parameters: int
    weights: int
    gradients: int
    low_rank_state: int
    dense_state: int
    activations: int
    workspace: int = 0
    gpus: int = 1
    strategy: str = ""
    gathered: int = 0
    sent: Traffic = Traffic()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> int:
        """Bytes of the whole optimizer state."""
        return self.low_rank_state + self.dense_state

    @property
    def passing(self) -> int:
        """Bytes of what does not last: activations, which are gone when a step needs its workspace, or that.

        Both where refreshes go on beside the next step (`async_refresh`).
        """
        together = int(self.options.get("async_refresh") or 0) > 0
        return self.activations + self.workspace if together else max(self.activations, self.workspace)

    @property
    def total(self) -> int:
        """Bytes at most."""
        return self.weights + self.gradients + self.gathered + self.state + self.passing

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and sums, ready for JSON."""
        return {**asdict(self), "options": dict(self.options), "state": self.state, "total": self.total}

    def json(self) -> str:
        """Return `as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def describe(self) -> str:
        """Return what was asked for, in one line."""
        asked = [self.model, self.optim, *([] if self.rank is None else [f"rank {self.rank}"]), self.dtype]
        asked += [f"batch {self.batch} x {self.seq} tokens"]
        asked += ["checkpointing"] * self.checkpointing + ["layerwise"] * self.layerwise
        asked += [f"each of {self.gpus} GPUs, {self.strategy}"] if self.gpus > 1 else []
        return ", ".join([*asked, *(f"{k}={v}" for k, v in self.options.items())])

    def table(self) -> str:
        """Return the parts as a Markdown table, in GB (10^9) and GiB (2^30)."""
        rows = [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer state, matrices", self.low_rank_state),
            ("optimizer state, all else", self.dense_state),
            ("activations, until the step", self.activations),
            ("workspace of the step", self.workspace),
            *([("buckets or gathered layers", self.gathered)] if self.gathered else []),
            ("total", self.total),
            *((f"sent per step: {what}", count) for what, count in asdict(self.sent).items() if count),
        ]
        lines = ["| part | GB | GiB |", "|---|---:|---:|"]
        lines += [f"| {name} | {count / 1e9:.2f} | {count / 2**30:.2f} |" for name, count in rows]
        return f"{self.describe()} ({self.parameters / 1e6:.1f} M parameters)\n\n" + "\n".join(lines)


def estimate_memory(
    model: str | Path | nn.Module,
    optim: str,
    *,
    rank: float | None = None,
    batch: int = 1,
    seq: int = 256,
    dtype: str = "bf16",
    checkpointing: bool = False,
    layerwise: bool | None = None,
    options: Mapping[str, Any] | None = None,
    counting: str = "stored",
    gpus: int = 1,
    strategy: str = "",
) -> MemoryEstimate:
    """Count the bytes of a training run from shapes alone.

    Args:
        model: a size of models.LLAMA ("60m" .. "405b"), a config file or folder, a model's id on the hub, or a model.
        optim: a method's name, with or without `_8bit` and `_layerwise`, or "adamw_torch".
        rank: dimension of the subspace; None for the method's default.
        batch, seq: sequences of one step (of one micro-batch, on one process) and their tokens.
        dtype: "bf16", "fp16" or "fp32": how weights, gradients and activations are kept; "model": as the model has
            them, parameter by parameter.
        checkpointing: whether activations are recomputed in the backward pass, layer by layer.
        layerwise: whether gradients are freed during backward; None as the name says.
        options: further options of the method, `target_modules`, and those of layer sampling, with which gradients and
            state are those of the layers that train at once, where these are largest.
        counting: "stored": what is really stored, moments in fp32 unless 8-bit; "bf16": as the papers' tables count,
            two bytes for every number of the state and one for an 8-bit code.
        gpus: processes, of one device each.
        strategy: how the run is spread over them, one of by_name.NAMES; "" for DistributedDataParallel.

    Raises:
        ValueError: for an unknown model, method, option, dtype or strategy, with what is valid; for a combination that
            training refuses (`by_name.DoesNotRun`).
    """
    _check(dtype, counting, batch, seq)
    net = loaded(model)
    size = bytes_of.own_type if dtype == AS_MODEL else lambda _: DTYPES[dtype].itemsize
    given = {**(options or {}), **({} if layerwise is None else {"layerwise": layerwise})}
    spread = strategy_of(strategy, gpus, net, given)
    blank = MemoryEstimate(
        model=str(model) if isinstance(model, (str, Path)) else type(model).__name__,
        optim=optim,
        rank=None,
        batch=batch,
        seq=seq,
        dtype=dtype,
        checkpointing=checkpointing,
        layerwise=bool(layerwise),
        options=dict(options or {}),
        parameters=sum(p.numel() for p in net.parameters()),
        weights=spread.held(net, size),
        gradients=0,
        low_rank_state=0,
        dense_state=0,
        activations=activation_bytes(
            net,
            batch=batch,
            seq=seq,
            itemsize=_usual(net, size),
            checkpointing=checkpointing,
            pieces=spread.activation_pieces,
        ),
        gpus=gpus,
        strategy=spread.name,
    )
    tokens = Tokens(batch, seq, _usual(net, size))
    rule = layer_sampling.take(given)
    if optim in ADAMW and (others := [key for key, value in given.items() if (key, value) != ("layerwise", False)]):
        raise ValueError(f"{optim} is torch's, and has none of these options: {', '.join(others)}")
    optimizer = None if optim in ADAMW else build_optimizer(net, optim, rank, given)
    if optimizer is not None:
        check_runs(spread, optim, optimizer.declared())
    trained = [(name, p) for name, p in modules.trainable(net)]
    with layer_sampling.at_most(net, [p for _, p in trained], rule):
        if optimizer is None:
            whole = [Declared(name, p, DENSE, Plan.of(p, DENSE)) for name, p in trained if p.requires_grad]
            pieces, kept = spread.pieces(whole), [spread.piece(name, p) for name, p, *_ in spread.kept(whole)]
            gradients = bytes_of.weight_bytes([one.weight for one in pieces], size)
            found = replace(blank, gradients=gradients, dense_state=bytes_of.adamw_bytes(kept, size))
        else:
            whole, matrices = list(optimizer.declared()), [g for g in optimizer.param_groups if "rank" in g]
            pieces, kept_pieces = spread.pieces(whole), spread.pieces(spread.kept(whole))
            low_rank, dense = bytes_of.state_bytes(kept_pieces, *([paper_bytes] if counting == "bf16" else []))
            found = replace(
                blank,
                rank=_rank_of(optimizer),
                layerwise=any(group["layerwise"] for group in matrices),
                gradients=bytes_of.gradient_bytes(pieces, size),
                workspace=workspace_bytes(pieces, size),
                low_rank_state=low_rank,
                dense_state=dense,
            )
        step = [one for one in whole if one.weight.requires_grad]
        return replace(found, gathered=spread.gathered(net, step, size), sent=spread.traffic(net, step, size, tokens))


def _rank_of(optimizer: LowRankOptimizer) -> float | None:
    """Return the rank of the matrices, or None where they are stepped whole."""
    low_rank = [config for config in optimizer.configs if config.low_rank]
    return low_rank[0].options["rank"] if low_rank and not low_rank[0].parts.subspace.whole else None


DENSE = Config.of("full_adamw", {}, low_rank=False)
"""What AdamW does to any parameter, in the place of torch's."""


def loaded(model: str | Path | nn.Module) -> nn.Module:
    """Return a model, by name where transformers is installed."""
    if isinstance(model, nn.Module):
        return model
    from hf_lowrank.hf.models import load_model

    return load_model(model)


def _usual(net: nn.Module, size: bytes_of.Size) -> int:
    """Return the bytes of one number in the type that most numbers of a model have."""
    found = Counter[int]()
    for p in net.parameters():
        found[size(p)] += p.numel()
    return found.most_common(1)[0][0] if found else 4


def _check(dtype: str, counting: str, batch: int, seq: int) -> None:
    for what, value, valid in (("dtype", dtype, (*DTYPES, AS_MODEL)), ("counting", counting, ("stored", "bf16"))):
        if value not in valid:
            raise ValueError(f"{what} must be one of {', '.join(valid)}, got {value!r}")
    if batch < 1 or seq < 1:
        raise ValueError(f"batch and seq must be at least 1, got {batch} and {seq}")


OF_THE_RUN = ("target_modules", "shard_state")
"""Options that no group has."""


def build_optimizer(net: nn.Module, optim: str, rank: float | None, given: Mapping[str, Any]) -> LowRankOptimizer:
    """Return the optimizer of a model that may lie on the meta device; its state is declared, not allocated."""
    chosen = {k: v for k, v in given.items() if k not in OF_THE_RUN}
    if rank is not None:
        chosen["rank"] = rank
    with unsaid():
        split = groups.param_groups(net, method=optim, target_modules=given.get("target_modules"), **chosen)
        return LowRankOptimizer(split, optim)


def paper_bytes(one: Declared) -> int:
    """Count stored state as the papers do: two bytes a number, one for an 8-bit code, scales and counters free."""
    counted = (buffer for buffer in one.kept.values() if buffer.slot.values != "exact")
    return sum(buffer.numel * min(2, buffer.slot.dtype.itemsize) for buffer in counted)
