"""What groups and checkpoints must be, and what is said when they are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, nan
from typing import Any

import torch

from hf_lowrank.engine.checkpoint import _STRUCTURE
from hf_lowrank.methods import resolve


TORCH_KEYS = {"params", "param_names", "lr", "betas", "eps", "weight_decay", "name", "initial_lr", "method", "format"}
"""Keys of a group that are no options of a method."""


def check_group(group: Mapping[str, Any], low_rank: bool) -> None:
    """Refuse values and parameters that cannot be trained."""
    betas = group["betas"]
    beta1, beta2 = betas if isinstance(betas, (tuple, list)) and len(betas) == 2 else (nan, nan)
    for name, value, below in (
        ("lr", group["lr"], inf),
        ("eps", group["eps"], inf),
        ("weight_decay", group["weight_decay"], inf),
        ("betas", beta1, 1.0),
        ("betas", beta2, 1.0),
    ):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = nan
        if not 0 <= number < below:
            raise ValueError(f"{name} must be in [0, {below:g}), got {group[name]!r}")
    for i, p in enumerate(group["params"]):
        name = group["param_names"][i] if "param_names" in group else f"of shape {tuple(p.shape)}"
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"parameter {name} is {p.dtype}; train it in float32, bfloat16 or float16, or freeze it")
        if low_rank and (p.dim() not in (2, 3) or 0 in p.shape):
            raise ValueError(
                f"parameter {name} has shape {tuple(p.shape)}; only matrices and stacks of matrices are projected. "
                "Put it in a group without 'rank'. (FSDP1 and ZeRO flatten parameters: use FSDP2.)"
            )


_SHAPES_STATE = ("error_feedback", "accumulate", "history", "queue_size", "head_dim")
"""Options of parts that say which tensors there are: a checkpoint's hold, an edit would have none."""


def check_edits(groups: Sequence[Mapping[str, Any]], checked: Sequence[Mapping[str, Any]]) -> None:
    """Check groups whose values were edited.

    Raises:
        ValueError: for a value that is not valid, and for an edit of what the state is built on.
    """
    for group, before in zip(groups, checked, strict=False):
        for key in (*_STRUCTURE, *_SHAPES_STATE):
            if group.get(key) != before.get(key):
                raise ValueError(f"{key} cannot be changed while training; it was {before.get(key)}")
    for group in groups:
        options = {k: v for k, v in group.items() if k not in TORCH_KEYS}
        resolve.complete(group["method"], options, low_rank="rank" in group)
        check_group(group, "rank" in group)
    norms = {float(group["max_grad_norm"]) for group in groups} - {0.0}
    if len(norms) > 1:
        raise ValueError(f"all groups are clipped together: give them one max_grad_norm, not {sorted(norms)}")
    along = [g["method"] for g in groups if "rank" in g and resolve.parts(g["method"], g).needs_gradient]
    if max(norms, default=0.0) and along:
        raise ValueError(f"{along[0]} steps along the gradient itself, which is not clipped: set max_grad_norm=0")
