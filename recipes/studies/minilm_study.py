"""Fine-tune MiniLM, in its RoBERTa form, with several optimizers at equal budgets, and record every result.

    python recipes/glue/bert_to_roberta.py --output_dir runs/minilm
    python recipes/studies/minilm_study.py --model runs/minilm --data_dir DATA

DATA holds sst2, cola and rte as CSV files (`run.py --data_dir`). Task after task, the learning rate of every method's
matrices is looked for at rank 8, on a part of the training set with a seed of its own (SST-2 takes that of CoLA); then
the other seeds run at it. What minilm_study.jsonl has already is not run again, so a study that was stopped goes on,
and two commands may run at a time, each with other methods in `--rows`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import hf_lowrank


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.glue import data  # noqa: E402
from recipes.glue.comparison import Cell, Ledger, run_missing  # noqa: E402
from recipes.glue.settings import parse  # noqa: E402
from recipes.glue.tasks import TASKS  # noqa: E402
from recipes.glue.training import train  # noqa: E402
from recipes.shared.common import machine  # noqa: E402
from recipes.shared.display import markdown  # noqa: E402
from recipes.studies.compare_tables import interval, paired  # noqa: E402


FILE = Path(__file__).resolve().parent / "minilm_study.jsonl"

BASELINE = "full_adamw"
_MATRICES = "query,key,value,intermediate.dense,output.dense"
_REST = "embedding_lr=5e-5,vector_lr=5e-5,head_lr=1e-3"
"""Rates of all else, the same in every row that trains it: those of a pretrained encoder, and of a new head."""


def _row(method: str, rates: tuple[float, ...], *options: str) -> tuple[str, tuple[float, ...]]:
    given = ",".join([*options, _REST])
    return f"--optim {method} --optim_args {given} --optim_target_modules {_MATRICES}", rates


def _low_rank(method: str, rank: int) -> tuple[str, tuple[float, ...]]:
    return _row(method, (2e-4, 4e-4, 8e-4), f"rank={rank}", "update_proj_gap=100", "scale=1")


def _lora(rank: int) -> tuple[str, tuple[float, ...]]:
    adapters = f"--adapter_rank {rank} --adapter_alpha {rank} --adapter_dropout 0 --adapter_targets {_MATRICES}"
    return f"--optim adamw_torch --baseline lora {adapters}", (5e-4, 1e-3, 2e-3)


ROWS = {
    BASELINE: _row("full_adamw", (2.5e-5, 5e-5, 1e-4)),
    "muon_4bit": _row("muon_4bit", (5e-5, 1e-4, 2e-4)),
    **{f"LoRA, rank {rank}": _lora(rank) for rank in (8, 4)},
    **{
        f"{method}, rank {rank}": _low_rank(method, rank)
        for method in ("galore_i3s_adamw", "fira_adamw", "subtrack_pp_adamw", "alice_adamw")
        for rank in (8, 4)
    },
}
"""Options of a row, and the learning rates of its matrices that are tried: of LoRA those of adapters and head."""

BUDGET = {
    "cola": "--num_train_epochs 2 --per_device_train_batch_size 32",
    "sst2": "--num_train_epochs 1 --per_device_train_batch_size 16 --max_train_samples 4000",
    "rte": "--num_train_epochs 4 --per_device_train_batch_size 16",
}
COMMON = (
    "--max_seq_length 128 --lr_scheduler_type linear --warmup_steps 0.06 --train_sampling_strategy group_by_length "
    "--bf16 True --per_device_eval_batch_size 64 --save_strategy no --logging_steps 50 --report_to none "
    "--disable_tqdm True --dataloader_pin_memory False"
)
CHOSEN_ON, GRID_SEED = {"cola": "cola", "sst2": "cola", "rte": "rte"}, 0
"""On which task the rates of a task are chosen."""
HELD_OUT = {"cola": 1000, "rte": 500}
"""Of a training set: the last rows, on which rates are chosen. No score is read for that."""
MOST_RATES = 6
"""Where the best rate is at an edge of those tried, the next one (half or twice) is tried too, up to this many."""


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="folder that bert_to_roberta.py made")
    parser.add_argument("--data_dir", help="folder with cola, rte and sst2")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="methods to run; default: all")
    parser.add_argument("--tasks", nargs="+", choices=BUDGET, default=list(BUDGET), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--file", type=Path, default=FILE, help="where results are recorded")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/minilm_study"), help="folder of the trainings")
    parser.add_argument("--print", action="store_true", help="run nothing, print the tables")
    arguments = parser.parse_args()
    hf_lowrank.register()
    ledger = Ledger(arguments.file)
    if not arguments.print:
        if not (arguments.model and arguments.data_dir):
            parser.error("--model and --data_dir say what to train on which data")
        study(ledger, arguments)
    print(results_table(ledger, arguments.seeds, arguments.tasks) + "\n\n" + grid_table(ledger, arguments.tasks))


def study(ledger: Ledger, arguments: argparse.Namespace) -> None:
    """Look for the rates, then run task after task, each with all seeds, of every row asked for."""
    where = ["--model_name_or_path", arguments.model]
    where += [] if torch.cuda.is_available() else ["--use_cpu", "True", "--attn_implementation", "eager"]
    held_out, hardware = split_off(arguments.data_dir, arguments.output_dir), machine()

    def train_there(command: list[str]) -> dict[str, Any]:
        tuning = command[command.index("--seed") + 1] == str(GRID_SEED)
        data_dir = str(held_out) if tuning else arguments.data_dir
        return {**train(*parse([*command, *where, "--data_dir", data_dir])), "machine": hardware}

    def run(cells: list[Cell]) -> None:
        run_missing(cells, ledger, arguments.output_dir, train_there, record=True)

    for task in arguments.tasks:
        for row in dict.fromkeys(map(tuned_as, arguments.rows)):
            search(row, CHOSEN_ON[task], ledger, run)
        rates = {row: best_rate(ledger, row, task) for row in arguments.rows}
        found = {row: rate for row, rate in rates.items() if rate is not None}  # else its search failed
        run([cell(row, task, seed, rate) for seed in arguments.seeds for row, rate in found.items()])


def split_off(data_dir: str, output_dir: Path) -> Path:
    """Write training sets in two, the last HELD_OUT rows to choose rates by; return the folder."""
    for task, count in HELD_OUT.items():
        rows, folder = data.load(task, data_dir)["train"], output_dir / "tuning" / task
        folder.mkdir(parents=True, exist_ok=True)
        cut = len(rows) - count
        for name, some in (("train", range(cut)), ("validation", range(cut, len(rows)))):
            whole = folder / f"{os.getpid()}.part"  # another command may be reading the same
            rows.select(some).to_csv(str(whole), index=False)
            whole.replace(folder / f"{name}.csv")
    return output_dir / "tuning"


def cell(row: str, task: str, seed: int, rate: float) -> Cell:
    """Return one training of the study."""
    options = f"--task {task} --learning_rate {rate:g} {ROWS[row][0]} {BUDGET[task]} {COMMON}"
    return Cell(row, task, seed, tuple(options.split()))


def tuned_as(row: str) -> str:
    """Return the row whose learning rate a row takes: rank 4 that of rank 8."""
    return row.replace("rank 4", "rank 8")


def search(row: str, task: str, ledger: Ledger, run: Callable[[list[Cell]], None]) -> None:
    """Try the learning rates of a method on a task until the best is not at an edge."""
    rates = sorted({*ROWS[row][1], *tried(ledger, row, task)})  # a search that was stopped goes on
    while True:
        run([cell(row, task, GRID_SEED, rate) for rate in rates])
        best = best_rate(ledger, row, task)
        if best is None:  # what went wrong has been said
            return
        if min(rates) < best < max(rates) or len(rates) >= MOST_RATES:
            return
        rates.append(best / 2 if best == min(rates) else best * 2)


def tried(ledger: Ledger, row: str, task: str) -> dict[float, float]:
    """Return the score of every learning rate that was tried on a task."""
    rates = [rate * 2.0**power for rate in ROWS[row][1][:1] for power in range(-MOST_RATES, 2 * MOST_RATES)]
    found = {rate: ledger.find(cell(row, task, GRID_SEED, rate)) for rate in rates}
    return {rate: main_score(result, task) for rate, result in found.items() if result}


def best_rate(ledger: Ledger, row: str, task: str) -> float | None:
    """Return the learning rate with the best score where a task's is chosen, or None; of equals the highest."""
    scores = tried(ledger, tuned_as(row), CHOSEN_ON[task])
    return max(scores, key=lambda rate: (scores[rate], rate), default=None)


def chosen_on(tasks: Iterable[str]) -> list[str]:
    """Return the tasks on which the rates of some are chosen, each once."""
    return [*dict.fromkeys(CHOSEN_ON[task] for task in tasks)]


def main_score(result: dict[str, Any], task: str) -> float:
    """Return the task's main metric, times 100."""
    return 100 * next(iter(result["metrics"].values()))[TASKS[task].metrics[0]]


def results_table(ledger: Ledger, seeds: list[int], tasks: Iterable[str] = tuple(BUDGET)) -> str:
    """Return scores by row and task, means over seeds with 95 % intervals by Student's t, as Markdown.

    A task of which nothing is recorded has no column. The mean over the others, and its difference to BASELINE's, are
    of the seeds that have all of them, paired by seed.
    """
    found = {row: scores_of(ledger, row, seeds) for row in ROWS}
    tasks = [task for task in tasks if any(scores[task] for scores in found.values())]
    found = {row: {task: scores[task] for task in tasks} for row, scores in found.items() if any(scores.values())}
    grids = chosen_on(tasks)
    head = ["", *(f"lr, {TASKS[grid].title}" for grid in grids)]
    head += [f"{TASKS[task].title} {TASKS[task].metrics[0].split('_')[0]}" for task in tasks]
    head += ["mean", f"minus {BASELINE}", "seeds", "optimizer state, MiB"]
    reference, lines = means(found.get(BASELINE, {})), []
    for row, scores in found.items():
        whole = means(scores)
        difference = paired(whole, reference) if row != BASELINE else None
        state = max(result["state_mib"] for result in ledger.results if result["row"] == row)
        counts = "/".join(str(len(values)) for values in scores.values())
        cells = [interval_text([*values.values()]) for values in (*scores.values(), whole)]
        shown = "-" if difference is None else _text(difference, "+")
        rates = [best_rate(ledger, row, grid) for grid in grids]
        lr = ["-" if rate is None else f"{rate:g}" for rate in rates]
        lines.append([row, *lr, *cells, shown, counts, f"{state:.1f}"])
    return markdown(head, lines)


def scores_of(ledger: Ledger, row: str, seeds: list[int]) -> dict[str, dict[int, float]]:
    """Return the scores of a row at its best rates by task and seed."""
    scores: dict[str, dict[int, float]] = {}
    for task in BUDGET:
        rate = best_rate(ledger, row, task) or 0.0
        found = {seed: ledger.find(cell(row, task, seed, rate)) for seed in seeds}
        scores[task] = {seed: main_score(result, task) for seed, result in found.items() if result}
    return scores


def means(scores: dict[str, dict[int, float]]) -> dict[int, float]:
    """Return the mean over the tasks of every seed that has all of them."""
    if not scores:
        return {}
    whole = set.intersection(*(set(values) for values in scores.values()))
    return {seed: mean(values[seed] for values in scores.values()) for seed in sorted(whole)}


def interval_text(values: list[float]) -> str:
    """Return a mean with half of its interval; of one value the value, of none a dash."""
    if not values:
        return "-"
    return _text(interval(values))


def _text(found: tuple[float, float], sign: str = "") -> str:
    middle, half = found
    return f"{middle:{sign}.1f}" + (f" ± {half:.1f}" if half < inf else "")


def grid_table(ledger: Ledger, tasks: Iterable[str] = tuple(BUDGET)) -> str:
    """Return the score of every learning rate that was tried, as Markdown, the chosen in bold."""
    lines = []
    grids = [task for task in chosen_on(tasks) if any(tried(ledger, row, task) for row in ROWS)]
    for row in ROWS:
        texts = [_trials(tried(ledger, row, task), best_rate(ledger, row, task)) for task in grids]
        lines += [[row, *(text or "-" for text in texts)]] if any(texts) else []
    return markdown(["", *(f"{TASKS[task].title} at each learning rate, seed {GRID_SEED}" for task in grids)], lines)


def _trials(scores: dict[float, float], best: float | None) -> str:
    texts = {rate: f"{rate:g}: {value:.1f}" for rate, value in sorted(scores.items())}
    return ", ".join(f"**{text}**" if rate == best else text for rate, text in texts.items())


if __name__ == "__main__":
    main()
