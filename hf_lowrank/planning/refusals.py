"""What training refuses to run under a strategy by the options alone, so that no plan has figures for it."""

from __future__ import annotations

from collections.abc import Iterable

from hf_lowrank.engine.matrix import reduces
from hf_lowrank.methods.resolve import Config
from hf_lowrank.planning.strategies import DoesNotRun, Owned, Replicated, Sharded, Strategy, Tensors


def check(spread: Strategy, method: str, configs: Iterable[Config]) -> None:
    """Refuse what training refuses.

    Args:
        spread: how the run is spread over processes.
        method: its name.
        configs: of all groups.

    Raises:
        DoesNotRun: naming the way out.
    """
    for config in configs:
        if reason := _reason(spread, config):
            raise DoesNotRun(f"{method} does not run so under {spread.name}: {reason}")


def _reason(spread: Strategy, config: Config) -> str:
    options = config.options
    if isinstance(spread, Owned):
        if options["layerwise"]:
            return "state that each process keeps for some parameters does not go together with layerwise; use fsdp2"
        if options.get("reduce_projected"):
            return "leave out reduce_projected, which needs every basis on every process"
    if isinstance(spread, Replicated) and config.hooked and not reduces(config):
        return "its step needs whole gradients: use fsdp2, or leave out layerwise"
    if not isinstance(spread, (Sharded, Tensors)):
        return ""
    for option in ("reduce_projected", "async_refresh"):
        if options.get(option):
            return f"leave out {option}"
    if options.get("proj_type") == "full":
        return "proj_type=full needs whole weights: use ddp, or another proj_type"
    if options.get("shard_basis") and options.get("basis_format") in ("8bit", "4bit"):
        return "shard_basis keeps pieces of bases as they are: leave out it, or basis_format"
    return ""
