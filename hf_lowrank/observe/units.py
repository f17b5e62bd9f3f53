"""Amounts of memory. Needs no torch."""

from __future__ import annotations

import re


MIB = 2**20

UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": MIB, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """Read "24GB" or "24G" (10^9), "24GiB" (2^30); a number without a unit is bytes, and has at least seven digits.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = (match[2].upper() or "B") if match else ""
    unit += "B" if f"{unit}B" in UNITS else ""
    if match is None or unit not in UNITS or (not match[2] and len(match[1].partition(".")[0]) < 7):
        raise ValueError(f"{text!r} is not an amount of memory; write for instance 24GB or 24GiB")
    return int(float(match[1]) * UNITS[unit])
