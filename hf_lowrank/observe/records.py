"""The files that a run leaves beside its checkpoints, and the types of modules in them. Needs no torch.

Reading is forgiving: a line that was cut short by a kill is left out, and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


RUN_FILE = "hf_lowrank.json"
"""In the output folder: the resolved options of every group, and the bytes of weights, gradients and state."""

REFRESH_FILE = "hf_lowrank_refreshes.jsonl"
"""In the output folder: one line per refresh of a matrix."""

STEPS_FILE = "hf_lowrank_steps.jsonl"
"""In the output folder: one line per step: its milliseconds, the optimizer's, the refreshes in it, seconds so far."""

FIRST_FILE = "hf_lowrank_first_subspaces.pt"
"""In the output folder: a sketch of the first basis of every matrix."""

LOCK_FILE = "_hf_lowrank.lock"
"""In the output folder while a run trains: who does. `push_to_hub` leaves out what begins with an underscore."""

MODULE_TYPES = ("q", "k", "v", "o", "gate", "up", "down", "other")
"""The matrices of a transformer block, by what they do."""

_NAMES = {
    "q": r"q|q_proj|query|q_lin|wq|query_proj",
    "k": r"k|k_proj|key|k_lin|wk|key_proj",
    "v": r"v|v_proj|value|v_lin|wv|value_proj",
    "o": r"o|o_proj|out_proj|out_lin|wo|.*att[^.]*\.(?:output\.dense|dense|c_proj)",
    "gate": r"gate_proj|w1|wi_0",
    "up": r"up_proj|fc1|lin1|c_fc|w3|wi|wi_1|dense_h_to_4h|intermediate\.dense",
    "down": r"down_proj|fc2|lin2|c_proj|w2|dense_4h_to_h|output\.dense",
}
_PATTERNS = {kind: re.compile(rf"(?:.*\.)?(?:{names})(?:\.weight)?") for kind, names in _NAMES.items()}


def module_type(name: str) -> str:
    """Return which of MODULE_TYPES a matrix is, from the name of its module (LLaMA, GPT-2, BERT, T5 and their kin)."""
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.fullmatch(name)), "other")


def append(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add one line of JSON per row."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if text:
        with file.open("a") as out:
            out.write(text)


def read(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the rows of a file of JSON lines, none if it is absent, and how many lines could not be read."""
    if not file.exists():
        return [], 0
    rows, broken = list[dict[str, Any]](), 0
    for line in file.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            broken += 1
    return rows, broken


def keep_up_to(file: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after `step`, which a resumed run writes again, and any that was cut short; return the rest."""
    rows = [row for row in read(file)[0] if row["step"] <= step]
    if file.exists():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows
