"""What fits into a card: every way to save memory, at the largest rank that it allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowrank import layer_sampling
from hf_lowrank.methods import resolve
from hf_lowrank.observe.units import parse_bytes
from hf_lowrank.planning.by_name import DoesNotRun
from hf_lowrank.planning.memory import OF_THE_RUN, MemoryEstimate, estimate_memory, loaded


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


def fit_budget(
    model: str | Path | nn.Module,
    budget_bytes: int | str,
    optim: str = "galore_i3s_adamw",
    *,
    ranks: Sequence[float] | None = None,
    batch: int = 1,
    seq: int = 256,
    dtype: str = "bf16",
    options: Mapping[str, Any] | None = None,
    gpus: int = 1,
    strategy: str = "",
) -> list[MemoryEstimate]:
    """Return what fits into a budget: for every way to save memory the largest rank, the fewest savings first.

    A way is left out where one with fewer savings allows the same rank.

    Args:
        model: see `estimate_memory`.
        budget_bytes: bytes there are, or text such as "24GB" or "24GiB"; leave room for the accelerator's context.
        optim: a method's name without an ending; 8-bit, layerwise and checkpointing are tried.
        ranks: ranks to try; None for the powers of two up to half of the model's width, for a method whose ranks are
            fractions for those of 1/2 to 1/64; `rank` among the options is the only one to try.
        batch, seq, dtype, options, gpus, strategy: see `estimate_memory`.

    Returns:
        Estimates of at most `budget_bytes`; none where nothing fits.

    Raises:
        ValueError: for a budget that is no amount of memory, or none; for `layerwise` among the options; for what
            training refuses in every mode.
    """
    if isinstance(budget_bytes, str):
        budget_bytes = parse_bytes(budget_bytes)
    if budget_bytes <= 0:
        raise ValueError(f"budget_bytes must be above 0, got {budget_bytes}")
    net, given = loaded(model), dict(options or {})
    row = resolve.split(optim)[0]
    if "layerwise" in given:
        raise ValueError("a budget tries layerwise and the plain mode by itself: leave the option layerwise out")
    if "rank" in given:
        ranks = [given.pop("rank")]
    tried = _usual_ranks(net, row, given) if ranks is None else sorted(ranks, reverse=True)
    found: dict[frozenset[str], MemoryEstimate] = {}
    refused: DoesNotRun | None = None
    counted = False
    for mode in MODES:
        name = f"{row}_8bit" if mode.get("eight_bit") else row
        shared: dict[str, Any] = {
            "batch": batch,
            "seq": seq,
            "dtype": dtype,
            "options": given,
            "gpus": gpus,
            "strategy": strategy,
        }
        shared |= {key: mode.get(key, False) for key in ("checkpointing", "layerwise")}
        for rank in tried:
            try:
                estimate = estimate_memory(net, name, rank=rank, **shared)
            except DoesNotRun as error:
                refused = error
                break
            counted = True
            if any(fewer < mode.keys() and best.rank == estimate.rank for fewer, best in found.items()):
                break
            if estimate.total <= budget_bytes:
                shown = str(model) if isinstance(model, (str, Path)) else estimate.model
                found[frozenset(mode)] = replace(estimate, model=shown)
                break
    if refused is not None and not counted:
        raise refused
    return list(found.values())


def _usual_ranks(net: nn.Module, row: str, options: Mapping[str, Any]) -> Sequence[float | None]:
    """Return the ranks to try for a method, the largest first: of those that its subspace takes."""
    sampling = dict(options)
    layer_sampling.take(sampling)
    own = {key: value for key, value in sampling.items() if key not in OF_THE_RUN}
    subspace = resolve.Config.of(row, own, model=True).parts.subspace
    if subspace.whole:
        return [None]  # it has none
    width = max(min(p.shape[-2:]) for p in net.parameters() if p.dim() >= 2)
    ranks = [2**i for i in reversed(range(2, max(3, width.bit_length() - 1)))]
    try:
        subspace.check_rank(ranks[0])
    except ValueError:
        return [2.0**-i for i in range(1, 7)]
    return ranks
