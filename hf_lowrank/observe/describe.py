"""An optimizer and a refresh in a line or a dictionary, for logs and files."""

from __future__ import annotations

from typing import Any

from hf_lowrank.optimizer import LowRankOptimizer


MIB = 2**20


def headline(found: dict[str, float]) -> str:
    """Say in one line what the last refresh did."""
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
    if "limited" in values:
        text.append(f"limiter active in {values['limited']:.0%} of the steps")
    return "; ".join(text)


def resolved_options(optimizer: LowRankOptimizer) -> dict[str, Any]:
    """Return every group's options and the names of its parameters, as plain data."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return {"optimizer": optimizer.defaults["method"], "groups": groups}


def summary(optimizer: LowRankOptimizer) -> str:
    """Describe in one line what is projected, at which rank and learning rates, and what the state costs."""
    matrices = [one for one in optimizer.declared() if one.config.low_rank]
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    declared = optimizer.declared_bytes()
    adamw = sum(8 * p.numel() for p in everything)
    ranks = sorted({one.plan.r for one in matrices})
    lr = optimizer.param_groups[0]["lr"]
    text = f"{optimizer.defaults['method']}: {len(matrices)} matrices at rank {_span(ranks)}"
    if matrices:
        scale = matrices[0].config.options["scale"]
        text += f", lr {lr * scale:g} ({lr:g} x scale {scale:g})"
    text += f"; {len(everything) - len(matrices)} dense parameters, lr {lr:g}"
    return text + f"; state {declared / MIB:.1f} MiB (AdamW: {adamw / MIB:.1f} MiB)"


def _span(values: list[int]) -> str:
    return f"{values[0]}-{values[-1]}" if len(values) > 1 else str(values[0]) if values else "-"
