"""An optimizer and a refresh in a line or a dictionary, for logs and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_lowrank import __version__
from hf_lowrank.methods.dense import SAME
from hf_lowrank.methods.registry import Gauge
from hf_lowrank.methods.resolve import with_endings
from hf_lowrank.observe.counting import adamw_bytes, component_bytes
from hf_lowrank.observe.units import MIB
from hf_lowrank.optimizer import LowRankOptimizer


def headline(found: Mapping[str, float], gauges: Mapping[str, Gauge]) -> str:
    """Say in one line what the last refresh did.

    Args:
        found: the metrics of a log.
        gauges: what the parts declare, by name.
    """
    values = {key.removeprefix("lowrank/"): value for key, value in found.items()}
    text = [f"subspaces refreshed in {values['refresh_ms']:.0f} ms"]
    if "overlap" in values:
        by_type = {key.split("/")[1]: v for key, v in values.items() if key.startswith("overlap/")}
        least = min(by_type, key=lambda kind: by_type[kind])
        first = f", {values['overlap_first']:.2f} with the first" if "overlap_first" in values else ""
        text.append(
            f"overlap {values['overlap']:.2f} with the one before (least: {least} {by_type[least]:.2f}){first}"
        )
    if "energy" in values:
        text.append(f"{values['energy']:.0%} of the gradient inside")
    if "stable_rank" in values:
        text.append(f"stable rank {values['stable_rank']:.1f}")
    text += [gauge_text(name, gauge, values[name]) for name, gauge in gauges.items() if name in values]
    return "; ".join(text)


def has_subspaces(optimizer: LowRankOptimizer) -> bool:
    """Tell whether any matrix is stepped in a subspace, and not whole."""
    return any(one.config.low_rank and not one.config.parts.subspace.whole for one in optimizer.declared())


def called(optimizer: LowRankOptimizer) -> str:
    """Return the name of the optimizer, with the endings that its options stand for."""
    main = next((config for config in optimizer.configs if config.low_rank), optimizer.configs[0])
    return with_endings(main.method, main.options)


def gauge_text(name: str, gauge: Gauge, value: float) -> str:
    """Say what a gauge shows."""
    words = name.replace("_", " ")
    return f"{words} in {value:.0%} of the steps" if gauge.counted else f"{words} {value:.3g}"


def resolved_options(optimizer: LowRankOptimizer) -> dict[str, Any]:
    """Return every group's options and the names and shapes of its parameters, as plain data."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    shapes = [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    return {"optimizer": called(optimizer), "groups": groups, "shapes": shapes}


def described(optimizer: LowRankOptimizer, model: nn.Module | None = None) -> dict[str, Any]:
    """Return what a run is, as plain data: options, shapes, gauges and, if the model is known, its class and bytes.

    Args:
        optimizer: the optimizer.
        model: what it trains.
    """
    known = {**resolved_options(optimizer), "version": __version__}
    known["gauges"] = {name: {"help": one.help, "counted": one.counted} for name, one in optimizer.gauges().items()}
    if model is not None:
        known["model"] = type(getattr(model, "_orig_mod", model)).__name__  # below torch.compile
        known["memory"] = component_bytes(optimizer, model.parameters())
    return known


def summary(optimizer: LowRankOptimizer) -> str:
    """Describe in one line what is projected, at which rank and learning rates, and what the state costs."""
    matrices = [one for one in optimizer.declared() if one.config.low_rank]
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    declared = optimizer.declared_bytes()
    adamw = adamw_bytes(everything)
    ranks = sorted({one.plan.r for one in matrices})
    lr = optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])  # a warm-up starts at zero
    whole = bool(matrices) and matrices[0].config.parts.subspace.whole
    place = "stepped whole" if whole else f"at rank {_span(ranks)}"
    text = f"{called(optimizer)}: {len(matrices)} matrices {place}"
    if matrices:
        config = matrices[0].config
        scale = config.options["scale"]
        rate = config.parts.reconstruction.rate(scale)
        factor = f"scale {scale:g}" if rate == scale else f"{rate:g}, of scale {scale:g}"
        text += f", lr {lr * rate:.3g} ({lr:g} x {factor})"
    text += f"; {len(everything) - len(matrices)} dense parameters, lr {lr:g}{_apart(optimizer, lr)}"
    here = " on this process" if optimizer.shard_state else ""
    return text + f"; state {declared / MIB:.1f} MiB{here} (AdamW: {adamw / MIB:.1f} MiB)"


def _apart(optimizer: LowRankOptimizer, lr: float) -> str:
    """Say which kinds of dense parameters have another rate or rule than the others, in parentheses."""
    found = dict[str, list[str]]()
    for group, config in zip(optimizer.param_groups, optimizer.configs, strict=True):
        if not config.low_rank:
            rate, rule = group.get("initial_lr", group["lr"]), config.options["dense"]
            told = [f"lr {rate:g}"] * (rate != lr) + [f"by {rule}"] * (rule != SAME)
            if told:
                found.setdefault(config.options["kind"], told)
    texts = [f"{kind} {', '.join(told)}" for kind, told in found.items()]
    return f" ({'; '.join(texts)})" if texts else ""


def _span(values: list[int]) -> str:
    return f"{values[0]}-{values[-1]}" if len(values) > 1 else str(values[0]) if values else "-"
