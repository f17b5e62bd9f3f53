"""How much memory a training run takes, before it starts: bytes from shapes alone, nothing is allocated.

Weights, gradients and optimizer state are exact: the state is what the method's parts declare, which is what the
first step allocates. Activations follow a simple rule, see `activations.activation_bytes`; what a step allocates for a
moment on an accelerator is bounded (`counting.workspace_bytes`). The context of an accelerator (about 0.5 GB under
CUDA) and fragmentation are not counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lowrank import groups, layer_sampling, modules
from hf_lowrank.engine.work import Declared
from hf_lowrank.methods import resolve
from hf_lowrank.observe import counting as bytes_of
from hf_lowrank.observe.units import parse_bytes as parse_bytes
from hf_lowrank.optimizer import LowRankOptimizer
from hf_lowrank.planning.activations import activation_bytes


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

AS_MODEL = "model"
"""In the place of a type: every parameter has the one that it has in the model."""

ADAMW = ("adamw_torch", "adamw_torch_fused")
"""Trainer's names of torch's AdamW, estimated for comparison."""

MODES: tuple[dict[str, Any], ...] = (
    {},
    {"checkpointing": True},
    {"eight_bit": True},
    {"layerwise": True},
    {"eight_bit": True, "checkpointing": True},
    {"layerwise": True, "checkpointing": True},
    {"eight_bit": True, "layerwise": True},
    {"eight_bit": True, "layerwise": True, "checkpointing": True},
)
"""Ways to save memory that `fit_budget` tries, the fewest first."""


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
        workspace: what a step allocates for a moment on an accelerator, at most (`counting.workspace_bytes`).
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
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> int:
        """Bytes of the whole optimizer state."""
        return self.low_rank_state + self.dense_state

    @property
    def total(self) -> int:
        """Bytes at most: activations are gone when a step needs its workspace."""
        return self.weights + self.gradients + self.state + max(self.activations, self.workspace)

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
            ("total", self.total),
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
) -> MemoryEstimate:
    """Count the bytes of a training run from shapes alone.

    Args:
        model: a size of models.LLAMA ("60m" .. "7b"), a config file or folder, a model's id on the hub, or a model.
        optim: a method's name, with or without `_8bit` and `_layerwise`, or "adamw_torch".
        rank: dimension of the subspace; None for the method's default.
        batch, seq: sequences of one step (of one micro-batch) and their tokens.
        dtype: "bf16", "fp16" or "fp32": how weights, gradients and activations are kept; "model": as the model has
            them, parameter by parameter.
        checkpointing: whether activations are recomputed in the backward pass, layer by layer.
        layerwise: whether gradients are freed during backward; None as the name says.
        options: further options of the method, `target_modules`, and those of layer sampling, with which gradients and
            state are those of the layers that train at once, where these are largest.
        counting: "stored": what is really stored, moments in fp32 unless 8-bit; "bf16": as the papers' tables count,
            two bytes for every number of the state and one for an 8-bit code.

    Raises:
        ValueError: for an unknown model, method, option or dtype; the message lists what is valid.
    """
    _check(dtype, counting, batch, seq)
    net = _load(model)
    size = bytes_of.own_type if dtype == AS_MODEL else lambda _: DTYPES[dtype].itemsize
    blank = MemoryEstimate(
        model=str(model) if isinstance(model, (str, Path)) else type(model).__name__,
        optim=optim,
        rank=rank,
        batch=batch,
        seq=seq,
        dtype=dtype,
        checkpointing=checkpointing,
        layerwise=bool(layerwise),
        options=dict(options or {}),
        parameters=sum(p.numel() for p in net.parameters()),
        weights=bytes_of.weight_bytes(net.parameters(), size),
        gradients=0,
        low_rank_state=0,
        dense_state=0,
        activations=activation_bytes(
            net, batch=batch, seq=seq, itemsize=_usual(net, size), checkpointing=checkpointing
        ),
    )
    given = {**(options or {}), **({} if layerwise is None else {"layerwise": layerwise})}
    rule = layer_sampling.take(given)
    optimizer = None if optim in ADAMW else build_optimizer(net, optim, rank, given)
    with layer_sampling.at_most(net, [p for _, p in modules.trainable(net)], rule):
        if optimizer is not None:
            return _with_method(blank, optimizer, size, paper=counting == "bf16")
        trained = [p for _, p in modules.trainable(net)]
        gradients, state = bytes_of.weight_bytes(trained, size), bytes_of.adamw_bytes(trained, size)
        return replace(blank, gradients=gradients, dense_state=state)


def _load(model: str | Path | nn.Module) -> nn.Module:
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


def build_optimizer(net: nn.Module, optim: str, rank: float | None, given: Mapping[str, Any]) -> LowRankOptimizer:
    """Return the optimizer of a model that may lie on the meta device; its state is declared, not allocated."""
    chosen = {k: v for k, v in given.items() if k != "target_modules"}
    if rank is not None:
        chosen["rank"] = rank
    split = groups.param_groups(net, method=optim, target_modules=given.get("target_modules"), **chosen)
    return LowRankOptimizer(split, optim)


def _with_method(
    blank: MemoryEstimate, optimizer: LowRankOptimizer, size: bytes_of.Size, *, paper: bool
) -> MemoryEstimate:
    """Fill in what depends on the method."""
    matrices = [group for group in optimizer.param_groups if "rank" in group]
    low_rank, dense = bytes_of.state_bytes(optimizer, *([paper_bytes] if paper else []))
    return replace(
        blank,
        rank=matrices[0]["rank"] if matrices else blank.rank,
        layerwise=any(group["layerwise"] for group in matrices),
        gradients=bytes_of.gradient_bytes(optimizer, size),
        workspace=bytes_of.workspace_bytes(optimizer, size),
        low_rank_state=low_rank,
        dense_state=dense,
    )


def paper_bytes(one: Declared) -> int:
    """Count stored state as the papers do: two bytes a number, one for an 8-bit code, scales and counters free."""
    counted = (buffer for buffer in one.kept.values() if buffer.slot.values != "exact")
    return sum(buffer.numel * min(2, buffer.slot.dtype.itemsize) for buffer in counted)


def fit_budget(
    model: str | Path | nn.Module,
    budget_bytes: int,
    optim: str = "galore_i3s_adamw",
    *,
    ranks: Sequence[int] | None = None,
    batch: int = 1,
    seq: int = 256,
    dtype: str = "bf16",
    options: Mapping[str, Any] | None = None,
) -> list[MemoryEstimate]:
    """Return what fits into a budget: for every way to save memory the largest rank, the fewest savings first.

    A way is left out where one with fewer savings allows the same rank.

    Args:
        model: see `estimate_memory`.
        budget_bytes: bytes there are; leave room for the accelerator's context.
        optim: a method's name without an ending; 8-bit, layerwise and checkpointing are tried.
        ranks: ranks to try; None for the powers of two up to half of the model's width.
        batch, seq, dtype, options: see `estimate_memory`.

    Returns:
        Estimates of at most `budget_bytes`; none where nothing fits.
    """
    net = _load(model)
    row = resolve.split(optim)[0]
    if ranks is None:
        width = max(min(p.shape[-2:]) for p in net.parameters() if p.dim() >= 2)
        ranks = [2**i for i in range(2, max(3, width.bit_length() - 1))]
    found: dict[frozenset[str], MemoryEstimate] = {}
    for mode in MODES:
        name = f"{row}_8bit" if mode.get("eight_bit") else row
        shared: dict[str, Any] = {"batch": batch, "seq": seq, "dtype": dtype, "options": options}
        shared |= {key: mode.get(key, False) for key in ("checkpointing", "layerwise")}
        for rank in sorted(ranks, reverse=True):
            estimate = estimate_memory(net, name, rank=rank, **shared)
            if any(fewer < mode.keys() and best.rank == estimate.rank for fewer, best in found.items()):
                break
            if estimate.total <= budget_bytes:
                shown = str(model) if isinstance(model, (str, Path)) else estimate.model
                found[frozenset(mode)] = replace(estimate, model=shown)
                break
    return list(found.values())
