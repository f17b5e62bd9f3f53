"""What does not run over several processes: by the options, and by how a weight is cut.

The engine asks with weights at hand, plans with shapes alone. An answer is one sentence that names the way out, or "".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from hf_lowrank.engine.matrix import reduces
from hf_lowrank.methods.resolve import Config
from hf_lowrank.tensors.layout import Layout


def of_replicas(config: Config) -> str:
    """Answer for DistributedDataParallel."""
    if config.hooked and not reduces(config):
        return (
            "its step needs whole gradients, which the layerwise mode takes before they are averaged: use FSDP2, "
            "or leave out layerwise"
        )
    return ""


def of_owners(options: Mapping[str, Any]) -> str:
    """Answer for DistributedDataParallel where every process keeps the state of some parameters (`shard_state`)."""
    if options["layerwise"]:
        return "shard_state does not go together with layerwise: use FSDP2 for both, or leave out one"
    if options.get("reduce_projected"):
        return (
            "shard_state does not go together with reduce_projected, which needs every basis on every process: leave "
            "out one of them"
        )
    return ""


def of_shards(config: Config) -> str:
    """Answer for weights that are sharded (FSDP2, tensor parallel), however they are cut."""
    if config.options.get("reduce_projected"):
        return (
            "reduce_projected is for DistributedDataParallel; where weights are sharded no whole gradient travels "
            "between refreshes anyway: leave it out"
        )
    if config.options.get("async_refresh"):
        return "refreshes of sharded weights travel, so all processes wait for them: leave out async_refresh"
    if config.options.get("shard_basis") and config.options.get("basis_format") in ("8bit", "4bit"):
        return (
            f"shard_basis keeps pieces of bases as they are: leave out basis_format={config.options['basis_format']}, "
            "or shard_basis"
        )
    return ""


def of_shard(name: str, config: Config, axes: Collection[int], layout: Layout | None) -> str:
    """Answer for one sharded weight.

    Args:
        name: what it is called.
        config: its method and options.
        axes: its axes that several processes have pieces of.
        layout: how it lies, if it is stepped as a matrix.
    """
    inside = sorted({*axes} - {0})
    if inside and _coded(config):
        return (
            f"parameter {name} is split on another axis than its first ({inside[0]}), across blocks of its 8-bit or "
            "4-bit state: leave out _8bit, state_format and dense_state_format"
        )
    if layout is None:
        rule = config.dense_rule
        if inside and not rule.elementwise:
            return (
                f"{type(rule).__name__} looks at whole rows, which dense parameter {name} has on several processes "
                f"(split on axis {inside[0]}): split its first axis, or set dense=adam"
            )
        return ""
    subspace = config.parts.subspace
    if (layout.rows.split or layout.columns.split) and "n" not in subspace.projected.split():
        return "proj_type=full does not run on sharded weights: use DDP, or another proj_type"
    if layout.rows.split and not subspace.splits_rows:
        return (
            f"{config.method} adds up neighbours along the axis on which parameter {name} is split over processes: "
            "split the other axis, or use another method"
        )
    return ""


def _coded(config: Config) -> bool:
    """Tell whether state that lies as the weight does is kept in blocks of codes."""
    low_bits = {config.options["state_format"], config.options["dense_state_format"]} != {"fp32"}
    held = not config.by_matrix or any(slot.held for slot in config.parts.reconstruction.slots().values())
    return low_bits and held
