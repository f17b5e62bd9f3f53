"""Bytes of the optimizer state of whole models, counted from shapes."""

from __future__ import annotations

from tables import Section, Target

from hf_lowrank import METHODS
from hf_lowrank.hf.models import load_model
from hf_lowrank.planning.memory import estimate_memory


RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512}
EVERYTHING_8BIT = {"basis_format": "8bit"}


def section() -> Section:
    """Return MiB of state for every method and size, in fp32 and in 8 bits, on the meta device."""
    models = {size: load_model(size) for size in RANKS}
    adamw = {size: estimate_memory(net, "adamw_torch", dtype="fp32").state for size, net in models.items()}
    rows = [{"optimizer": "torch AdamW, fp32", **{size.upper(): round(x / 2**20) for size, x in adamw.items()}}]
    for row in METHODS:
        for ending, options in (("", {}), ("_8bit", {}), ("_8bit", EVERYTHING_8BIT)):
            label = f"{row}{ending}" + ", bases in 8 bits" * bool(options)
            try:
                own = METHODS[row].defaults.get("rank")  # APOLLO-Mini's 1; a share for those that compress by blocks
                state = {
                    size: estimate_memory(net, row + ending, rank=own or RANKS[size], options=options).state
                    for size, net in models.items()
                }
            except ValueError:  # a method without such an option
                continue
            rows.append({"optimizer": label, **{size.upper(): round(x / 2**20) for size, x in state.items()}})
    result = Section(f"MiB of optimizer state, counted; ranks {RANKS}", rows)
    for label, limit, options in (
        ("galore_i3s_adamw_8bit, bases in 8 bits", 0.19, EVERYTHING_8BIT),
        ("galore_i3s_adamw_8bit, bases in fp32", None, {}),
    ):
        state = estimate_memory(models["60m"], "galore_i3s_adamw_8bit", rank=128, options=options).state
        text = f"all optimizer state at 60M / AdamW's {adamw['60m'] / 2**20:.0f} MiB, {label}"
        result.targets.append(Target(text, limit, round(state / adamw["60m"], 4), "exact"))
    return result
