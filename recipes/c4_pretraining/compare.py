"""Compare optimizers at one budget: every row has two learning rates and the same grid of them.

    python recipes/c4_pretraining/compare.py --config recipes/c4_pretraining/configs/sotu.yaml \\
        --output_dir runs/compare \\
        --rows adamw galore_dominant_adamw galore_i3s_adamw fira_adamw fira_i3s_adamw \\
        --learning_rates 0.01 0.02 0.04 --matrix_learning_rates 0.00125 0.0025 0.005 --seeds 1 2 3

The grid is run with the first seed; the best cell of each row is repeated with the others. Options that are not listed
go to every training. What is recorded is not run again, so that a comparison that was interrupted goes on. --print
prints what there is, of several folders as columns side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import hf_lowrank  # noqa: E402
from recipes.c4_pretraining import table  # noqa: E402
from recipes.shared.baselines import fit_for  # noqa: E402
from recipes.shared.common import require_at_least, require_writable, stop  # noqa: E402


SETTINGS = "settings.json"
RESULT = "all_results.json"
USERS_MISTAKE = 2
"""The exit code that `stop` and argparse share."""
ROWS = ("adamw", "galore_dominant_adamw", "galore_i3s_adamw", "fira_adamw", "fira_i3s_adamw")
BASELINES = fit_for("pretraining")
Cell = dict[str, Any]


def main() -> None:
    """Run what is missing, then report."""
    arguments, more = read_arguments()
    folder: Path = arguments.output_dir[0]
    if not arguments.print:
        check_rows(arguments.rows)
        existed = folder.exists()
        keep_settings(folder, arguments, more)
        try:
            run_grid(folder, arguments, more)
        except SystemExit:
            if not existed and not any(folder.glob("*/log.txt")):
                shutil.rmtree(folder)  # a mistake leaves nothing behind
            raise
    results = {}
    for path in arguments.output_dir:
        found = collect(path)
        if found["title"] in results:  # models of one size are told apart by their folders
            found["title"] += f" ({path.name})"
        results[found["title"]] = found
        (path / "results.json").write_text(json.dumps(found, indent=2) + "\n")
        table.plot(path, found)
    text = table.markdown(results)
    (folder / "table.md").write_text(text)
    print(f"\n{text}")


def run_grid(folder: Path, arguments: argparse.Namespace, more: list[str]) -> None:
    """Run the grid with the first seed, then the best cell of every row with the others."""
    first, *others = arguments.seeds
    grid = list(product(arguments.learning_rates, arguments.matrix_learning_rates))
    run_all(folder, [cell(row, *rates, first) for row in arguments.rows for rates in grid], arguments, more)
    again = [{**best, "seed": seed} for best in bests(folder, arguments.rows, first) for seed in others]
    run_all(folder, again, arguments, more)


def read_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not listed here is for run.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=HERE / "configs" / "sotu.yaml", help="YAML file of run.py")
    parser.add_argument("--output_dir", nargs="+", type=Path, required=True, help="folder (several with --print)")
    parser.add_argument("--rows", nargs="+", default=ROWS, help=f"values of --optim, and {', '.join(BASELINES)}")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[0.01], help="of embeddings, head, norms")
    parser.add_argument(
        "--matrix_learning_rates", nargs="+", type=float, default=[0.0025], help="of matrices: lr x scale, for all"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="the first for the grid")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--print", action="store_true", help="run nothing")
    arguments, more = parser.parse_known_args()
    require_at_least(1, jobs=arguments.jobs)
    if len(arguments.output_dir) > 1 and not arguments.print:
        stop("several --output_dir are for --print")
    if not arguments.print and not arguments.config.is_file():
        stop(f"there is no file {arguments.config}")
    return arguments, more


def check_rows(rows: list[str]) -> None:
    """Refuse what is neither a baseline nor a name of the package."""
    for row in rows:
        method = row.removesuffix("_layerwise").removesuffix("_8bit")
        if row not in BASELINES and method not in hf_lowrank.METHODS:
            valid = ", ".join([*BASELINES, *hf_lowrank.METHODS])
            stop(f"--rows {row} is none of {valid} (the latter also with _8bit and _layerwise)")


def keep_settings(folder: Path, arguments: argparse.Namespace, more: list[str]) -> None:
    """Write down what all trainings have in common; refuse a folder of other settings."""
    settings = {"config": arguments.config.name, "content": arguments.config.read_text(), "options": shlex.join(more)}
    file = folder / SETTINGS
    require_writable(folder)
    if file.exists() and read(file) != settings:
        stop(f"{folder} holds a comparison with other settings; choose another --output_dir")
    if not file.exists() and folder.exists() and any(folder.iterdir()):
        stop(f"{folder} holds something that this recipe did not write; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")


def cell(row: str, learning_rate: float, matrix_learning_rate: float, seed: int) -> Cell:
    """Return what tells one training from the others."""
    rates = {"learning_rate": learning_rate, "matrix_learning_rate": matrix_learning_rate}
    return {"row": row, **rates, "seed": seed}


def name(one: Cell) -> str:
    """Return the folder of a training."""
    return f"{one['row']}-{one['learning_rate']:g}-{one['matrix_learning_rate']:g}-{one['seed']}"


def command(folder: Path, one: Cell, config: Path, more: list[str]) -> list[str]:
    """Return the command line of one training."""
    choice = ["--baseline" if one["row"] in BASELINES else "--optim", one["row"]]
    rates = [f"--{key}={one[key]:g}" for key in ("learning_rate", "matrix_learning_rate")]
    fixed = ["--seed", str(one["seed"]), "--save_strategy", "no", "--disable_tqdm", "true", "--report_to", "none"]
    folders = ["--output_dir", str(folder / name(one)), "--tokenizer_dir", str(folder / "tokenizer")]
    return [sys.executable, str(HERE / "run.py"), str(config), *fixed, *more, *choice, *rates, *folders]


def run_all(folder: Path, cells: list[Cell], arguments: argparse.Namespace, more: list[str]) -> None:
    """Run what is not recorded. A training that fails is reported and left out; after a user's mistake
    none is started."""
    running: set[subprocess.Popen[bytes]] = set()
    mistakes: list[str] = []

    def work(one: Cell) -> None:
        if mistakes:
            return
        line, path = command(folder, one, arguments.config, more), folder / name(one)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        with (path / "log.txt").open("w") as log:
            environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
            training = subprocess.Popen(line, stdout=log, stderr=log, env=environment)
            running.add(training)
            code = training.wait()
        if training not in running:  # the comparison was stopped, and the training with it
            return
        last = ((path / "log.txt").read_text().strip().splitlines() or [""])[-1]
        if code == USERS_MISTAKE:
            mistakes.append(f"{name(one)}: {last}")
            shutil.rmtree(path)
        elif code:
            print(f"{name(one)} failed: {last} (see {path / 'log.txt'})", file=sys.stderr, flush=True)
        else:
            keep(one, path, line)

    todo = [one for one in cells if not (folder / name(one) / "cell.json").exists()]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            list(pool.map(work, todo))
        finally:  # after Ctrl-C and SIGTERM: what still runs would go on without us
            while running:
                running.pop().kill()
    if mistakes:
        stop(mistakes[0])


def keep(one: Cell, path: Path, line: list[str]) -> None:
    """Record a finished training."""
    try:
        reached = perplexity(path)
    except KeyError as missing:
        stop(f"{path} has no {missing}: a comparison needs the evaluation at the end of every training")
    (path / "model.safetensors").unlink(missing_ok=True)  # what is kept of a grid is numbers
    unfinished = path / "cell.tmp"
    unfinished.write_text(json.dumps({**one, "command": shlex.join(line)}) + "\n")
    unfinished.replace(path / "cell.json")
    print(f"{name(one)}: {reached:.3f}", flush=True)


def read(file: Path) -> Any:
    """Return the content of a JSON file of ours."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        stop(f"{file} cannot be read; delete its folder and start again")


def perplexity(path: Path) -> float:
    """Return the validation perplexity of a finished training; infinite where it diverged."""
    value = float(read(path / RESULT)["eval_perplexity"])
    return value if isfinite(value) else float("inf")


def finished(folder: Path) -> Iterator[tuple[Cell, Path]]:
    """Yield every recorded training."""
    for file in sorted(folder.glob("*/cell.json")):
        yield read(file), file.parent


def bests(folder: Path, rows: list[str], seed: int) -> list[Cell]:
    """Return the best cell of every row that has one."""
    found = []
    for row in rows:
        mine = [(perplexity(path), one) for one, path in finished(folder) if (one["row"], one["seed"]) == (row, seed)]
        if mine:
            best = min(mine, key=lambda pair: pair[0])[1]
            found.append(cell(row, best["learning_rate"], best["matrix_learning_rate"], seed))
    return found


def collect(folder: Path) -> dict[str, Any]:
    """Return the results of a folder: of every row its best cell over its seeds, and the whole grid."""
    done = list(finished(folder))
    if not done:
        stop(f"{folder} holds no finished training")
    rows = {row: summary(folder, row, done) for row in dict.fromkeys(one["row"] for one, _ in done)}
    settings = read(folder / SETTINGS)
    return {**describe(done), "settings": settings, "rows": rows}


def summary(folder: Path, row: str, done: list[tuple[Cell, Path]]) -> dict[str, Any]:
    """Return one row: its best cell by the seed that the grid was run with, over all seeds; and the grid."""
    grid = [{**one, "perplexity": perplexity(path)} for one, path in done if one["row"] == row]
    first = Counter(one["seed"] for one in grid).most_common(1)[0][0]
    best = min((one for one in grid if one["seed"] == first), key=lambda one: one["perplexity"])
    rates = {key: best[key] for key in ("learning_rate", "matrix_learning_rate")}
    chosen = [one for one in grid if rates.items() <= one.items()]
    path = folder / name(best)
    numbers = read(path / RESULT)
    return {
        **rates,
        "seeds": [one["seed"] for one in chosen],
        "perplexities": [one["perplexity"] for one in chosen],
        "state_mib": numbers["optimizer_state_mib"],
        "train_seconds": numbers["train_seconds"],
        "papers_evaluator_perplexity": numbers["eval_papers_evaluator_perplexity"],
        "curve": table.curve(path),
        "grid": grid,
    }


def describe(done: list[tuple[Cell, Path]]) -> dict[str, Any]:
    """Return what the runs of a folder share: size, rank and width, tokens, machine."""
    path = done[0][1]
    numbers, llama = (read(path / file) for file in (RESULT, "config.json"))
    ranks = set()
    for _, other in done:
        if (options := other / "hf_lowrank.json").exists():
            groups = read(options)["groups"]
            ranks |= {group["rank"] for group in groups if "rank" in group}
    return {
        "title": table.count(numbers["parameters"]),
        "parameters": numbers["parameters"],
        "rank": "/".join(f"{rank:g}" for rank in sorted(ranks)) or "-",
        "width": llama["hidden_size"],
        "tokens": numbers.get("train_tokens"),
        "eval_tokens": numbers["eval_tokens"],
        "machine": numbers["machine"],
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that no training is left behind
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; started again, it goes on with what is missing", code=130)
