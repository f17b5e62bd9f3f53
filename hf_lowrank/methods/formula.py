"""How much state a method keeps, as a formula: derived from the slots that its parts declare."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from hf_lowrank.methods.combination import Parts
from hf_lowrank.methods.context import Columns
from hf_lowrank.methods.resolve import Config
from hf_lowrank.state.slots import Slots


ORDER = ("mr", "nr", "rr", "mn", "m", "n", "r", "1")
BITS = {"fp32": 32, "bf16": 16, "8bit": 8, "4bit": 4}


def state_formula(config: Config) -> str:
    """Return the numbers of state per m x n matrix (m <= n) at rank r, such as "mr + 2nr + 1".

    A number in fewer bits counts as their share of 32. Scales of number formats, counters and gauges come on top.
    """
    terms: dict[str, Fraction] = defaultdict(Fraction)
    for slots, encoding in _declared(config.parts, config.options):
        for slot in slots.values():
            if slot.shared or slot.lifetime == "gauge":
                continue
            letters, factor = [], Fraction(1)
            for axis in slot.axes.split():
                if axis.isdigit():
                    factor *= int(axis)
                else:
                    letters.append(axis)
            name = slot.encoding or ("fp32" if slot.values == "exact" else encoding)
            terms["".join(sorted(letters)) or "1"] += factor * Fraction(BITS[name], 32)
    written = [_term(terms[key], key) for key in sorted(terms, key=ORDER.index)]
    return " + ".join(written) or "0"


def _declared(parts: Parts, options: Mapping[str, Any]) -> list[tuple[Slots, str]]:
    """Return the slots of every part with the number format of those that may be encoded."""
    moments = parts.moments.slots(Columns(2, block=1))  # of a tall or square weight
    *_, rows, columns = parts.subspace.projected.split()
    letters = {"r": rows, "n": columns}
    renamed = {
        name: replace(slot, axes=" ".join(letters.get(axis, axis) for axis in slot.axes.split()))
        for name, slot in moments.items()
    }
    basis, state = options.get("basis_format", "fp32"), options["state_format"]
    return [(parts.subspace.slots(), basis), (renamed, state), (parts.reconstruction.slots(), state)]


def _term(factor: Fraction, letters: str) -> str:
    number = "" if factor.numerator == 1 and letters != "1" else str(factor.numerator)
    letters = "r^2" if letters == "rr" else letters
    text = number if letters == "1" else number + letters
    return text if factor.denominator == 1 else f"{text}/{factor.denominator}"
