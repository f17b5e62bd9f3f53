"""Several trainings, one after the other: recorded as they end, skipped where they are recorded."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.glue.tables import Runs
from recipes.shared.lines import Lines


@dataclass(frozen=True)
class Cell:
    """One training of a comparison.

    Attributes:
        row: its row in the tables.
        task: its column.
        seed: its seed.
        options: the command line of the training, without seed and output folder.
    """

    row: str
    task: str
    seed: int
    options: tuple[str, ...]

    @property
    def key(self) -> dict[str, Any]:
        """What tells this training from others in a file of results; not whether it goes on from a checkpoint."""
        text = re.sub(r" --resume_from_checkpoint[ =](?!--)\S+", "", " " + " ".join(self.options)).strip()
        return {"row": self.row, "task": self.task, "seed": self.seed, "options": text}

    def command(self, folder: Path) -> list[str]:
        """Return the whole command line."""
        output = folder / self.row.replace(":", "-") / self.task / f"seed-{self.seed}"
        return [*self.options, "--seed", str(self.seed), "--output_dir", str(output)]


class Ledger(Lines):
    """Results in a file of JSON lines, one per training; several processes may add to it."""

    allow_nan = True  # of a training that diverged

    @property
    def results(self) -> list[dict[str, Any]]:
        """All that there are."""
        return self.runs

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """Return the result of a training, if it is recorded."""
        return next((result for result in self.results if cell.key.items() <= result.items()), None)

    def append(self, cell: Cell, result: dict[str, Any]) -> None:
        """Record a result."""
        self.write({**cell.key, **result})

    def of(self, cells: list[Cell]) -> Runs:
        """Return what there is of the given trainings, in their order."""
        found: Runs = {}
        for cell in cells:
            result = self.find(cell)
            if result is not None:
                found.setdefault(cell.row, {}).setdefault(cell.task, []).append(result)
        return found


def run_missing(
    cells: list[Cell], ledger: Ledger, folder: Path, train: Callable[[list[str]], dict[str, Any]], *, record: bool
) -> int:
    """Train what is not recorded yet. One that fails is reported and left out; a user's mistake ends all.

    Args:
        cells: the trainings.
        ledger: where results are.
        folder: where the trainings write.
        train: takes a command line and returns results.
        record: whether to write and print; False on all processes but one.

    Returns:
        How many failed.
    """
    todo = [cell for cell in cells if ledger.find(cell) is None]
    failed = 0
    for number, cell in enumerate(todo, start=1):
        title = f"{cell.row}, {cell.task}, seed {cell.seed}"
        if record:
            print(f"\n[{number} of {len(todo)}] {title}", flush=True)
        try:
            result = train(cell.command(folder))
        except Exception:  # a user's mistake is a SystemExit, and ends all
            traceback.print_exc()
            print(f"{title}: failed, see above", file=sys.stderr)
            failed += 1
            continue
        if record:
            ledger.append(cell, result)
            print(f"{title}: {result['metrics']}", flush=True)
    return failed
