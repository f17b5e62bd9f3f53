"""Options that every method of the table understands."""

from __future__ import annotations

from typing import Any

from hf_lowrank import METHODS
from hf_lowrank.methods import resolve


def fitting(method: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options for any method: those that mean nothing to it left out, those that it cannot do without filled in."""
    row = resolve.split(method)[0]
    subspace = resolve.parts(row, options).subspace
    fitted = {key: value for key, value in options.items() if key not in subspace.without}
    default = METHODS[row].defaults.get("rank", 128)
    if "rank" in options and default < 1:  # it compresses by a power of two
        fitted["rank"] = default
    if hasattr(subspace, "total_steps"):
        fitted.setdefault("total_steps", 8)
    return fitted
