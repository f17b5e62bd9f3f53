"""What studies and comparisons record: a JSON line for every finished run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from recipes.shared.common import stop


def require_file(file: Path) -> None:
    """End with one sentence if results cannot be recorded in a file, for where it is."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        stop(f"--file {file}: {'that is a folder' if file.is_dir() else 'its folder does not exist'}")


def read_json(file: Path) -> dict[str, Any]:
    """Return what a JSON file holds, or end with one sentence if it is none."""
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        stop(f"{file} holds no results; move it away, or name another file")


class Lines:
    """A file of JSON lines; a last one that a kill has cut short counts as none, and is overwritten.

    Another that is none ends all with one sentence.
    """

    allow_nan = False

    def __init__(self, file: Path) -> None:
        self.file = file
        whole, _, self.cut = file.read_text().rpartition("\n") if file.exists() else ("", "", "")
        self.runs: list[dict[str, Any]] = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self.runs.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                stop(f"line {number} of {file} is not a result; delete it")

    def write(self, line: dict[str, Any]) -> None:
        """Add a line."""
        if self.cut:
            os.truncate(self.file, self.file.stat().st_size - len(self.cut.encode()))
            self.cut = ""
        self.runs.append(line)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps(line, allow_nan=self.allow_nan) + "\n")
