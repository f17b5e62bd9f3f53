"""What studies record: a JSON line for every finished run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Lines:
    """A file of JSON lines; a last one that a kill has cut short counts as none, and is overwritten."""

    def __init__(self, file: Path) -> None:
        self.file = file
        whole, _, self.cut = file.read_text().rpartition("\n") if file.exists() else ("", "", "")
        self.runs: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def write(self, line: dict[str, Any]) -> None:
        """Add a line."""
        if self.cut:
            os.truncate(self.file, self.file.stat().st_size - len(self.cut.encode()))
            self.cut = ""
        self.runs.append(line)
        with self.file.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
