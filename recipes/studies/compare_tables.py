"""The tables of compare_methods.py, from what is recorded; nothing is run.

python recipes/studies/compare_tables.py                                     # the small model, 1000 steps
python recipes/studies/compare_tables.py --size large --steps 1200
python recipes/studies/compare_tables.py --bytes 1 --minus muon_4bit         # differences to another row
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from scipy.stats import t, ttest_rel


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.shared.common import require_at_least, stop  # noqa: E402
from recipes.shared.display import markdown  # noqa: E402
from recipes.shared.lines import require_file  # noqa: E402
from recipes.studies.compare_methods import Record, add_study_options, rows_of  # noqa: E402
from recipes.studies.compare_rows import BASELINE, ROWS, Point, Row, settled  # noqa: E402


@dataclass(frozen=True)
class Result:
    """A line of the table: the runs of a row at its best point on the seeds that tuned nothing.

    Attributes:
        row: which.
        best: its best point on the tuning text, with the tuning seed.
        trials: how many points were tried.
        at_edge: whether a neighbour of the best has not been tried.
        runs: by seed.
    """

    row: Row
    best: Point
    trials: int
    at_edge: bool
    runs: Mapping[int, dict[str, Any]]

    @property
    def losses(self) -> dict[int, float]:
        """Loss on the text that tuned nothing, by seed; of a run that diverged, inf."""
        return losses(self.runs)

    def middle(self, key: str) -> float:
        """Return the median of a measurement over the seeds."""
        return median(run[key] for run in self.runs.values())


def losses(runs: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    """Return the loss on the text that tuned nothing, by seed; of a run that diverged, inf."""
    return {seed: inf if run["score_loss"] is None else run["score_loss"] for seed, run in runs.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of its 95 % interval by Student's t: t(0.975, n - 1) s / sqrt(n); one value has inf."""
    n = len(values)
    if inf in values:
        return inf, inf
    return mean(values), float(t.ppf(0.975, n - 1)) * stdev(values) / sqrt(n) if n > 1 else inf


def paired(losses: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[float, float] | None:
    """Return the interval of the differences, seed by seed; None where no seed is in both."""
    common = sorted(losses.keys() & baseline.keys())
    if any(inf in (losses[seed], baseline[seed]) for seed in common):
        return inf, inf
    return interval([losses[seed] - baseline[seed] for seed in common]) if common else None


def chance(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """Return the two-sided p-value of a t test of losses paired by seed; 1 where it says nothing: of fewer than two
    seeds, of runs that diverged, or of losses that are the same.
    """
    common = sorted(first.keys() & second.keys())
    pairs = [(first[seed], second[seed]) for seed in common]
    if len(pairs) < 2 or any(inf in pair for pair in pairs) or all(a == b for a, b in pairs):
        return 1.0
    return float(ttest_rel(*zip(*pairs, strict=True)).pvalue)


def corrected(chances: Sequence[float]) -> list[float]:
    """Return p-values of as many tests, by Holm's step-down: the smallest times their number, the next times one less
    and at least as large, and so on; at most 1."""
    found, least = [1.0] * len(chances), 0.0
    for rank, i in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        least = found[i] = max(least, min(1.0, (len(chances) - rank) * chances[i]))
    return found


def results(record: Record, rows: Sequence[Row], size: str, steps: int) -> list[Result]:
    """Return the rows that have a score, the lowest loss first."""
    found = []
    for row in rows:
        trials, best = record.trials(row, size, steps), record.best(row, size, steps)
        if best is not None and (runs := record.scores(row, size, steps)):
            found.append(Result(row, best, len(trials), not settled(trials, row), runs))
    return sorted(found, key=lambda result: mean(result.losses.values()))


def table(found: Sequence[Result], baseline: Result | None) -> str:
    """Return the results as Markdown, losses with 95 % intervals, differences to a baseline's paired by seed."""
    head = ["row", "bytes per element", "state, MiB", "loss", f"minus {baseline.row.name if baseline else BASELINE}"]
    head += ["after Holm", "paired seeds", "refreshes", "trials", "rate", "other rate", "betas", "decay"]
    left = standing(found, baseline) if baseline else set()
    return markdown(head, [line(result, baseline, stands=result.row.name in left) for result in found])


def standing(found: Sequence[Result], baseline: Result) -> set[str]:
    """Return the rows whose difference to a baseline is not zero where all of a table are to be right together: by
    Holm's correction at 5 %."""
    others = [result for result in found if result.row != baseline.row]
    together = corrected([chance(result.losses, baseline.losses) for result in others])
    return {result.row.name for result, p in zip(others, together, strict=True) if p < 0.05}


def line(result: Result, baseline: Result | None, *, stands: bool) -> list[str]:
    """Return a row of the table."""
    values = result.best.values(result.row)
    difference = paired(result.losses, baseline.losses) if baseline and result.row != baseline.row else None
    return [
        result.row.name,
        f"{result.middle('matrix_bytes'):.2f}",
        f"{result.middle('state_bytes') / 2**20:.2f}",
        text(interval([*result.losses.values()])),
        text(difference, sign="+") if difference else "-",
        "yes" if stands else "-",
        str(len(result.losses.keys() & baseline.losses.keys()) if baseline else len(result.runs)),
        f"{result.middle('refreshes'):.0f}",
        f"{result.trials}{', at an edge' if result.at_edge else ''}",
        f"{values['matrix_rate']:g}",
        f"{values['other_rate']:g}",
        "{:g}, {:g}".format(*values["betas"]),
        f"{values['decay']:g}",
    ]


def text(found: tuple[float, float], sign: str = "") -> str:
    """Return an interval as text."""
    middle, half = found
    if middle == inf:
        return "diverged"
    return f"{middle:{sign}.3f}" + (f" ± {half:.3f}" if half < inf else "")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_options(parser)
    parser.add_argument(
        "--minus",
        choices=ROWS,
        default=BASELINE,
        help="the row that losses are compared with, as it is without --bytes and --own",
    )
    args = parser.parse_args()
    require_at_least(1, steps=args.steps)
    require_file(args.file)
    record = Record(args.file)
    found = results(record, rows_of(args), args.size, args.steps)
    baseline = next(iter(results(record, [ROWS[args.minus]], args.size, args.steps)), None)
    if not found or not baseline and args.minus != BASELINE:
        missing = args.minus if found else "these rows"
        stop(f"there is nothing to show: {args.file} has no score of {missing} at {args.size}, {args.steps} steps")
    print(table(found, baseline))


if __name__ == "__main__":
    main()
