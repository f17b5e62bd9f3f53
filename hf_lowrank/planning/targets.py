"""What an optimizer would do to a model, before anything is trained: which matrices, at which rank, at what cost."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_lowrank import groups
from hf_lowrank.engine.known import unsaid
from hf_lowrank.modules import kind_of
from hf_lowrank.observe.counting import adamw_bytes
from hf_lowrank.optimizer import LowRankOptimizer


@dataclass(frozen=True)
class Row:
    """Parameters with the same name (numbers of layers aside), shape and treatment.

    Attributes:
        name: the name, `*` for what differs.
        count: how many there are.
        shape: of one.
        rank: of the subspace, None where the parameter stays dense.
        whole: whether it is a matrix that is stepped whole, in no subspace.
        rule: of a dense parameter: the option `dense` of its group; None for a matrix.
        state_bytes: of the method, over all of them.
        adamw_bytes: what AdamW would keep for them, in the types that they have.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    rank: int | None
    whole: bool
    rule: str | None
    state_bytes: int
    adamw_bytes: int


def plan(model: nn.Module, method: str, *, target_modules: str | None = None, **options: Any) -> list[Row]:
    """Return one row per kind of parameter of a model, as an optimizer would treat it.

    Args:
        model: the model; on the meta device it costs nothing.
        method: a name from METHODS, with any ending.
        target_modules: see `param_groups`.
        options: options of the method.

    Raises:
        ValueError: for an unknown method or option, or where nothing can be projected.
    """
    with unsaid():
        split = groups.param_groups(model, method=method, target_modules=target_modules, **options)
        optimizer = LowRankOptimizer(split, method)
    found: dict[tuple[str, tuple[int, ...], int | None, bool, str | None], list[tuple[int, int]]] = defaultdict(list)
    for name, p, config, plan in optimizer.declared():
        rank = plan.r if config.low_rank else None
        whole = config.low_rank and config.parts.subspace.whole
        rule = None if config.low_rank else config.options["dense"]
        key = kind_of(name), tuple(p.shape), rank, whole, rule
        found[key].append((plan.nbytes, adamw_bytes([p])))
    return [
        Row(
            name,
            len(sizes),
            shape,
            rank,
            whole,
            rule,
            sum(ours for ours, _ in sizes),
            sum(adamw for _, adamw in sizes),
        )
        for (name, shape, rank, whole, rule), sizes in found.items()
    ]
