"""What each part of 4-bit Muon is worth: its row at its best point with one part changed or taken away, or three.

    python recipes/studies/ablations.py                    # trains what is missing, then prints the table
    python recipes/studies/ablations.py --print            # the table alone
    python recipes/studies/ablations.py --of full_adamw    # AdamW's own first moment, in the same way

Models, text and the point are those of compare_methods.py, where the row itself is recorded; the changed ones are
recorded in ablations.jsonl. Nothing is tuned again: a change is judged at the rates that suit the row without it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from recipes.shared.common import stop  # noqa: E402
from recipes.shared.display import markdown  # noqa: E402
from recipes.shared.lines import require_file  # noqa: E402
from recipes.studies.compare_methods import FILE as METHODS_FILE  # noqa: E402
from recipes.studies.compare_methods import (  # noqa: E402
    FIRST_SCORE_SEED,
    Record,
    Study,
    add_run_options,
    check_run_options,
    only_one,
    several,
)
from recipes.studies.compare_rows import ROWS, Point, Row  # noqa: E402
from recipes.studies.compare_tables import interval, losses, paired, text  # noqa: E402
from recipes.studies.compare_training import SIZES, Run  # noqa: E402


FILE = HERE / "ablations.jsonl"


@dataclass(frozen=True)
class Change:
    """A change of the row.

    Attributes:
        base: the row that is changed.
        says: which, in words.
        options: what differs in its options.
        decay: what differs in its point.
        betas: the decays of its moments, where they differ.
    """

    base: Row
    says: str
    options: Mapping[str, Any] = field(default_factory=dict)
    decay: int | None = None
    betas: tuple[float, float] | None = None

    @property
    def row(self) -> Row:
        """The changed row."""
        base, betas = self.base, (self.betas,) if self.betas else self.base.betas
        return replace(base, name=f"{base.name}, {self.says}", options={**base.options, **self.options}, betas=betas)

    def point(self, best: Point) -> Point:
        """Return the changed row's point."""
        moved = best if self.decay is None else best._replace(decay=self.decay)
        return moved._replace(betas=0) if self.betas else moved  # they are the middle of their own


_MUON, _ADAMW = ROWS["muon_4bit"], ROWS["full_adamw"]
CHANGES = (
    Change(_MUON, "momentum in 8 bits", {"state_format": "8bit"}),
    Change(_MUON, "momentum in fp32", {"state_format": "fp32"}),
    Change(_MUON, "rows not in units of their size", {"row_scales": False}),
    Change(_MUON, "a momentum of 0.9, not 0.8", betas=(0.9, 0.95)),
    Change(_MUON, "momentum itself, not Nesterov's", {"nesterov": False}),
    Change(_MUON, "three iterations", {"ns_steps": 3}),
    Change(_MUON, "the exact polar factor", {"orthogonalize": "exact"}),
    Change(_MUON, "no weight decay", decay=0),
    Change(_MUON, "three iterations, no units, no weight decay", {"ns_steps": 3, "row_scales": False}, decay=0),
    Change(_ADAMW, "b1 of 0.8, not 0.9", betas=(0.8, 0.999)),
)
BASES = {change.base.name: change.base for change in CHANGES}


def changes_of(base: Row) -> tuple[Change, ...]:
    """Return the changes of a row."""
    return tuple(change for change in CHANGES if change.base == base)


@dataclass(frozen=True)
class Changed(Study):
    """Every changed row at its point, with no search. `points`: by the name of the row."""

    points: Mapping[str, Point] = field(kw_only=True)

    def wanted(self, row: Row, record: Record) -> list[Run]:
        """Return the runs of a row that are not recorded."""
        done = record.at(self.points[row.name], row, self.size, self.steps)
        seeds = range(FIRST_SCORE_SEED, FIRST_SCORE_SEED + self.seeds)
        return [Run(row, self.points[row.name], self.size, self.steps, seed) for seed in seeds if seed not in done]


def table(
    name: str, base: Mapping[int, Mapping[str, Any]], changed: Mapping[str, Mapping[int, Mapping[str, Any]]]
) -> str:
    """Return the losses as Markdown, with 95 % intervals of the differences to the row `name`, paired by seed."""
    lines = []
    reference = losses(base)
    for says, runs in {"as it is": base, **changed}.items():
        if not runs:
            lines.append([says, *(["-"] * 4)])
            continue
        own = losses(runs)
        difference = paired(own, reference) if runs is not base else None
        size = median(run["matrix_bytes"] for run in runs.values())
        minus, seeds = text(difference, sign="+") if difference else "-", len(own.keys() & reference.keys())
        lines.append([says, f"{size:.2f}", text(interval([*own.values()])), minus, str(seeds)])
    head = ["change", "bytes per element", "loss", f"minus {name}, paired", "paired seeds"]
    return markdown(head, lines)


def main() -> None:
    """Train what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE, help="where results are recorded")
    parser.add_argument(
        "--base", type=Path, default=METHODS_FILE, help="where compare_methods.py has recorded the row"
    )
    parser.add_argument("--of", choices=BASES, default=_MUON.name, help="the row that is changed")
    parser.add_argument("--size", default="small", choices=SIZES, help="of the model")
    parser.add_argument("--steps", type=int, default=1000, help="of a training; 1024 tokens each")
    parser.add_argument("--changes", nargs="+", choices=[change.says for change in CHANGES], help="default: all")
    add_run_options(parser)
    parser.add_argument("--print", action="store_true", help="print the table of what is recorded, and run nothing")
    args = parser.parse_args()
    check_run_options(args)
    require_file(args.base)
    recorded, base = Record(args.base), BASES[args.of]
    best = recorded.best(base, args.size, args.steps)
    if best is None:
        stop(f"{args.base} has no search of {base.name} at {args.size}, {args.steps} steps: run compare_methods.py")
    changes = [change for change in changes_of(base) if args.changes is None or change.says in args.changes]
    if not changes:
        known = ", ".join(f'"{change.says}"' for change in changes_of(base))
        stop(f"--changes: these are none of {base.name}'s, which are {known}")
    points = {change.row.name: change.point(best) for change in changes}
    if not args.print:
        rows = tuple(change.row for change in changes)
        study = Changed(rows, args.size, args.steps, 1, 1, args.seeds, points=points)
        deadline = time.monotonic() + 60 * args.minutes
        with only_one(args.file):
            several(study, Record(args.file), deadline, args.jobs)
    record = Record(args.file)
    changed = {c.says: record.at(points[c.row.name], c.row, args.size, args.steps) for c in changes}
    print(table(base.name, recorded.scores(base, args.size, args.steps), changed))


if __name__ == "__main__":
    main()
