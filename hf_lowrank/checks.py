"""What groups and checkpoints must be, and what is said when they are not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from math import inf, nan
from typing import Any

import torch

from hf_lowrank import methods
from hf_lowrank.state import FORMAT_VERSION


TORCH_KEYS = {"params", "param_names", "lr", "betas", "eps", "weight_decay", "name", "initial_lr", "method", "format"}
"""Keys of a group that are no options of a method."""

_RUN_OPTIONS = ("layerwise", "max_grad_norm", "total_steps")
"""How a run is run, not what it computes: the caller's value holds, not the checkpoint's."""

_STRUCTURE = (
    *("method", "rank", "proj_type", "subspace", "moments", "reconstruction"),
    *("state_format", "basis_format", "dense_state_format"),
)


def check_checkpoint(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a checkpoint of another optimizer, method or structure."""
    if "state" not in state_dict or "param_groups" not in state_dict:
        raise ValueError(f"this is no optimizer checkpoint: it holds {', '.join(map(str, state_dict)) or 'nothing'}")
    saved_groups = state_dict["param_groups"]
    if any("format" not in group or "method" not in group for group in saved_groups):
        keys = sorted({k for s in state_dict.get("state", {}).values() for k in s})
        raise ValueError(
            "this checkpoint was written by another optimizer, not by hf_lowrank (its state holds: "
            f"{', '.join(map(str, keys)) or 'nothing'}). Resume with the optimizer that wrote it, or start from "
            "its weights alone."
        )
    if any(group["format"] > FORMAT_VERSION for group in saved_groups):
        raise ValueError("this checkpoint was written by a newer hf_lowrank; upgrade to read it")
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in groups]:
        raise ValueError(
            "the checkpoint's parameter groups hold "
            f"{[len(g['params']) for g in saved_groups]} parameters, this optimizer's "
            f"{[len(g['params']) for g in groups]}: another model, rank or set of target modules"
        )
    for saved, now in zip(saved_groups, groups, strict=True):
        names = saved.get("param_names"), now.get("param_names")
        if all(names) and names[0] != names[1]:
            raise ValueError("the checkpoint's parameters have other names, or another order, than this optimizer's")
        for key in _STRUCTURE:
            if saved.get(key) != now.get(key):
                raise ValueError(f"the checkpoint has {key}={saved.get(key)}, this optimizer {key}={now.get(key)}")


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


def merge_options(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved group as it is to be loaded: its own options, those that it lacks, and how this run is run."""
    return {**now, **saved, **{key: now[key] for key in _RUN_OPTIONS if key in now}}


def check_edits(groups: Sequence[Mapping[str, Any]], checked: Sequence[Mapping[str, Any]]) -> None:
    """Check groups whose values were edited.

    Raises:
        ValueError: for a value that is not valid, and for an edit of what the state is built on.
    """
    for group, before in zip(groups, checked, strict=False):
        for key in _STRUCTURE:
            if group.get(key) != before.get(key):
                raise ValueError(f"{key} cannot be changed while training; it was {before.get(key)}")
    for group in groups:
        options = {k: v for k, v in group.items() if k not in TORCH_KEYS}
        methods.complete(group["method"], options, low_rank="rank" in group)
        check_group(group, "rank" in group)


def warn_changed(loaded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Warn about options that differ from the checkpoint's; the schedule's lr and how the run is run aside."""
    for key in sorted(set(loaded) & set(given) - {"lr", "param_names", "params", *_RUN_OPTIONS}):
        if loaded[key] != given[key]:
            warnings.warn(
                f"{key}={given[key]} was given, the checkpoint has {loaded[key]}: the checkpoint's value is used",
                stacklevel=3,
            )
