"""Which optimizer should I use? Train every row of compare_rows.py at equal trials, and record every run.

    python recipes/studies/compare_methods.py --steps 300                          # where the longer runs start from
    python recipes/studies/compare_methods.py --start_from small:300 --trials 14 --most 14
    python recipes/studies/compare_tables.py                                       # the table, from what is recorded

Each row is tuned on one seed by the rule of `compare_rows.next_trial`, and scored with its best point on other seeds.
A finished run is a line of the file and is not run again; a kill loses the runs in flight.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import inf
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from recipes.shared.common import require_at_least, stop  # noqa: E402
from recipes.shared.lines import Lines, require_file  # noqa: E402
from recipes.studies.compare_rows import ROWS, START, Point, Row, beside, next_trial, other_formats  # noqa: E402
from recipes.studies.compare_training import (  # noqa: E402
    SIZES,
    TUNING_SEED,
    Run,
    at_bytes,
    read,
    study_key,
    train,
)


FILE = HERE / "compare_methods.jsonl"
FIRST_SCORE_SEED = TUNING_SEED + 1
MOST_BESIDE = 4
"""Trials beside a search, at most (`compare_rows.beside`)."""


class Record(Lines):
    """The finished runs."""

    def append(self, run: Run, result: Mapping[str, Any], **more: Any) -> None:
        """Write the result of a run down, with the version of the code."""
        self.write({**run.key, **result, **more, "commit": commit()})

    def of(self, row: Row, size: str, steps: int) -> list[dict[str, Any]]:
        """Return the runs of a row, at points that mean what they mean now."""
        wanted = study_key(row, size, steps)
        some = (run for run in self.runs if wanted.items() <= run.items())
        return [run for run in some if Point(*run["point"]).values(row).items() <= run.items()]

    def trials(self, row: Row, size: str, steps: int) -> dict[Point, float]:
        """Return the loss on the tuning text of every point of a row's search; of one that diverged, inf."""
        tuning = (run for run in self.of(row, size, steps) if run["seed"] == TUNING_SEED)
        return {Point(*run["point"]): inf if run["tune_loss"] is None else run["tune_loss"] for run in tuning}

    def best(self, row: Row, size: str, steps: int) -> Point | None:
        """Return the point with the lowest loss on the tuning text, or None before a search."""
        trials = self.trials(row, size, steps)
        return min(trials, key=trials.__getitem__) if trials else None

    def scores(self, row: Row, size: str, steps: int) -> dict[int, dict[str, Any]]:
        """Return the runs at a row's best point on the seeds that tuned nothing, by seed."""
        best = self.best(row, size, steps)
        return {seed: run for seed, run in self.at(best, row, size, steps).items() if seed != TUNING_SEED}

    def at(self, point: Point | None, row: Row, size: str, steps: int) -> dict[int, dict[str, Any]]:
        """Return the runs of a row at a point, by seed."""
        return {run["seed"]: run for run in self.of(row, size, steps) if tuple(run["point"]) == point}


@dataclass(frozen=True)
class Study:
    """What is asked for.

    Attributes:
        rows: which.
        size, steps: of the model, of a training.
        trials, most: trials of every row, and of one whose best stays at an edge.
        seeds: how many seeds score.
        start_from: size and steps of a study whose best points this one's searches start from.
    """

    rows: tuple[Row, ...]
    size: str
    steps: int
    trials: int
    most: int
    seeds: int
    start_from: tuple[str, int] | None = None

    def start(self, row: Row, record: Record) -> Point:
        """Return the point at which a row's search begins."""
        if self.start_from:
            for one in (ROWS.get(row.origin, row), row):
                if best := record.best(one, *self.start_from):
                    return best
        return START

    def wanted(self, row: Row, record: Record) -> list[Run]:
        """Return the runs of a row that may start now.

        The next trial of its search, then those at points that are tried beside it, or after them all that score.
        """
        start = self.start(row, record)
        trials = record.trials(row, self.size, self.steps)
        point = next_trial(trials, row, start=start, trials=self.trials, most=self.most)
        if point is None and len(trials) < self.most + MOST_BESIDE:
            formats = (record.best(one, self.size, self.steps) for one in other_formats(row))
            point = next(
                (one for one in beside(row, min(trials, key=trials.__getitem__), formats) if one not in trials), None
            )
        if point is not None:
            return [Run(row, point, self.size, self.steps, TUNING_SEED)]
        best, scored = record.best(row, self.size, self.steps), record.scores(row, self.size, self.steps)
        seeds = range(FIRST_SCORE_SEED, FIRST_SCORE_SEED + self.seeds)
        return [Run(row, best, self.size, self.steps, seed) for seed in seeds if best and seed not in scored]


def main() -> None:
    """Run what is missing."""
    study, args = parse()
    deadline = time.monotonic() + 60 * args.minutes
    with only_one(args.file):
        record = Record(args.file)
        if args.jobs == 1:
            torch.set_num_threads(1)
            alone(study, record, deadline)
        else:
            several(study, record, deadline, args.jobs)


@cache
def commit() -> str:
    """Return the commit of the code that runs, with a plus where files differ from it; "" outside of a checkout."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=HERE, capture_output=True, text=True
    )
    return found.stdout.strip()


@contextmanager
def only_one(file: Path) -> Iterator[None]:
    """Hold a file of results, so that no second study runs what this one is running; not on Windows.

    Ends with one sentence if another study holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with file.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stop(f"another study writes to {file}; wait for it, or choose another --file", code=1)
        yield


def alone(study: Study, record: Record, deadline: float = inf) -> None:
    """Run what is missing, one after the other, in this process."""
    while (run := first(study, record, ())) and time.monotonic() < deadline:
        note(record, run, train(run, read()))


def several(study: Study, record: Record, deadline: float, jobs: int) -> None:
    """Run what is missing, several at a time, each in a process with one thread. A row of which one run fails is left
    out, and the others go on.

    Raises:
        RuntimeError: in the end, naming the rows that were left out.
    """
    running: dict[Future[dict[str, Any]], Run] = {}
    failed: set[str] = set()
    with ProcessPoolExecutor(jobs, get_context("spawn"), begin_worker) as pool:
        while True:
            while (
                len(running) < jobs
                and time.monotonic() < deadline
                and (run := first(study, record, running.values(), failed))
            ):
                running[pool.submit(in_worker, run)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                if error := future.exception():
                    failed.add(run.row.name)
                    print(f"{run.row.name}, {[*run.point]}, seed {run.seed}: {error!r}; left out", file=sys.stderr)
                else:
                    note(record, run, future.result())

    if failed:
        raise RuntimeError(f"there were errors, printed above, in {', '.join(sorted(failed))}")


def begin_worker() -> None:
    """Keep a process of the pool to one thread, and let it end with the study: one that is killed tells it nothing."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


def in_worker(run: Run) -> dict[str, Any]:
    """Train in a process of the pool, which reads the text once."""
    return train(run, read())


def first(study: Study, record: Record, running: Iterable[Run], failed: Collection[str] = ()) -> Run | None:
    """Return the run to start next: rows in their order, but those in flight and rows that have failed."""
    wanted = (run for row in study.rows if row.name not in failed for run in study.wanted(row, record))
    return next((run for run in wanted if run not in running), None)


def note(record: Record, run: Run, result: Mapping[str, Any]) -> None:
    """Record a finished run and say so."""
    record.append(run, result, command=shlex.join(sys.argv))
    loss = result.get("score_loss", result["tune_loss"])
    print(f"{run.row.name}, {[*run.point]}, seed {run.seed}: {loss}, {result['seconds']:.0f} s", flush=True)


def parse() -> tuple[Study, argparse.Namespace]:
    """Return what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_study_options(parser)
    parser.add_argument("--trials", type=int, default=12, help="trials of every row")
    parser.add_argument("--most", type=int, default=20, help="trials of a row whose best stays at an edge")
    parser.add_argument("--start_from", metavar="SIZE:STEPS", help="start at the best points of another study")
    add_run_options(parser)
    args = parser.parse_args()
    check_run_options(args)
    check_trials(args)
    start = None
    if args.start_from:
        start = study_named(args.start_from, "--start_from")
        if not any(Record(args.file).trials(row, *start) for row in ROWS.values()):
            stop(f"--start_from {args.start_from}: {args.file} has no search of that size and length")
    study = Study(rows_of(args), args.size, args.steps, args.trials, args.most, args.seeds, start)
    return study, args


def study_named(name: str, what: str) -> tuple[str, int]:
    """Return the size and the steps of SIZE:STEPS."""
    size, _, steps = name.partition(":")
    if size not in SIZES or not steps.isdecimal():
        stop(f"{what} is SIZE:STEPS such as small:1000, not {name}")
    return size, int(steps)


def add_study_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which study it is, which the tables have too."""
    parser.add_argument("--file", type=Path, default=FILE, help="where results are recorded")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--steps", type=int, default=1000, help="of a training; 1024 tokens each")
    parser.add_argument("--rows", default=",".join(ROWS), help="names, separated by commas; default: all")
    parser.add_argument(
        "--own",
        action="store_true",
        help="embeddings, head and norms as each method has them; rows where that differs",
    )
    parser.add_argument("--bytes", type=float, help="ranks such that the state of matrices has this size per element")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how much is run."""
    parser.add_argument("--seeds", type=int, default=5, help="seeds that score, from 2 on; 1 is the one that tunes")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=inf, help="start nothing new after this time")


def check_run_options(args: argparse.Namespace) -> None:
    """End with one sentence if so much cannot be run, or not be recorded."""
    require_at_least(1, seeds=args.seeds, jobs=args.jobs, steps=args.steps)
    require_at_least(0, minutes=0 if args.minutes == inf else args.minutes)
    require_file(args.file)


def check_trials(args: argparse.Namespace) -> None:
    """End with one sentence if there is no search of so many trials."""
    require_at_least(1, trials=args.trials)
    if args.most < args.trials:
        stop(f"--most must be at least --trials, {args.trials}, not {args.most}")


def rows_of(args: argparse.Namespace) -> tuple[Row, ...]:
    """Return the rows that are asked for: with --own those that have embeddings and head of their own, with --bytes at
    the rank that fits those that do.
    """
    names = list(dict.fromkeys(args.rows.split(",")))
    for name in names:
        if name not in ROWS:
            stop(f"--rows: there is no row {name}; valid are {', '.join(ROWS)}")
    rows = [ROWS[name] for name in names]
    if args.own:
        rows = [own for row in rows if (own := row.own)]
        if not rows:
            stop("--own: these rows have embeddings and head as the fixed ones are")
    if args.bytes is not None:
        require_at_least(0, bytes=args.bytes)
        rows = [fit for row in rows if (fit := at_bytes(row, args.size, args.bytes))]
        if not rows:
            stop(f"--bytes {args.bytes:g}: none of these rows fits")
    return tuple(rows)


if __name__ == "__main__":
    main()
