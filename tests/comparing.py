"""The one loop that runs an optimizer beside the float64 references of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from references import Case, entry, reference
from streams import displacement, gradients, run, weight
from torch import Tensor

from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.methods import registry, resolve


STEPS, GAP = 16, 5  # four bases
# eps and decay are large enough to move a run by much more than the tolerance if misplaced: sqrt(V) is of order 1, so
# eps = 1e-2 is a hundredth of it
SETTING = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "scale": 0.5, "betas": (0.8, 0.95)}
# fp32 moments, products, weights and bases against float64
TOLERANCE = 1e-5


def optimizer(p: Tensor, name: str, *, called: str | None = None, **options: Any) -> LowRankOptimizer:
    """One group of one weight: the setting where the method has it, and options as they come."""
    valid = resolve.complete(name, {k: options[k] for k in (*registry.KINDS, "on_refresh") if k in options})
    usual = {"rank": valid["rank"] if valid["rank"] <= 1 else 3, "total_steps": STEPS, **SETTING}
    if valid.get("update_proj_gap", 1) > 1:
        usual["update_proj_gap"] = GAP
    common = {k: {**usual, **options}[k] for k in ("betas", "eps", "weight_decay", "lr")}
    group = {k: v for k, v in usual.items() if k in valid} | {k: v for k, v in options.items() if k not in common}
    return LowRankOptimizer([{"params": [(called, p)] if called else [p], **group}], name, **common)


def parts_of(group: Any) -> tuple[str, ...]:
    """The names of a group's parts."""
    row = METHODS[group["method"]]
    return tuple(str(group.get(kind, getattr(row, kind))) for kind in registry.KINDS)


def expected(p: Tensor, opt: LowRankOptimizer) -> float:
    """How far an fp32 run may end from its reference: what the least exact of its parts needs."""
    group = opt.param_groups[0]
    case = Case(tuple(p.shape[-2:]), group)
    return max(entry(*part).tolerance(case) for part in zip(registry.KINDS, parts_of(group), strict=True))


def references(p: Tensor, opt: LowRankOptimizer, *, called: str | None = None, **extra: Any) -> list[Any]:
    """The references of a weight, one for every matrix of a stack; `extra` attributes differ from the group's options.

    They know the options and the key of the run, and nothing of what it computes.
    """
    group = opt.param_groups[0]
    stack = tuple(p.shape[:-2])
    made = []
    for place, W in enumerate(p.detach().cpu().clone().reshape(-1, *p.shape[-2:])):
        case = Case(tuple(W.shape), group, called or "", stack=stack, place=place)
        made.append(reference(case, W, parts_of(group), **extra))
    return made


def compare(
    p: Tensor,
    opt: LowRankOptimizer,
    stream: list[Tensor],
    *,
    each: Callable[[int, Any, list[Any]], None] | None = None,
    **options: Any,
) -> tuple[float, list[Any]]:
    """Run both side by side and return their distance in units of the displacement, and the references."""
    start, refs = p.detach().clone(), references(p, opt, **options)
    for t in run(opt, p, stream):
        for ref, G in zip(refs, stream[t].reshape(-1, *p.shape[-2:]), strict=True):
            ref.step(G.cpu())
        if each:
            each(t, opt.param_groups[0], refs)
    return displacement(torch.stack([ref.weight for ref in refs]).reshape(p.shape), p, start), refs


def agree(
    name: str,
    shape: tuple[int, ...],
    *,
    tolerance: float | None = None,
    stream: list[Tensor] | None = None,
    each: Callable[[int, Any, list[Any]], None] | None = None,
    called: str | None = None,
    **options: Any,
) -> tuple[Tensor, LowRankOptimizer, list[Any]]:
    """Assert that a run of a method with some options equals its reference; return weight, optimizer, references."""
    p = weight(shape)
    opt = optimizer(p, name, called=called, **options)
    distance, refs = compare(p, opt, stream or gradients(shape, STEPS), each=each, called=called)
    assert distance < (expected(p, opt) if tolerance is None else tolerance)
    return p, opt, refs
