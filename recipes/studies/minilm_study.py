"""Fine-tune MiniLM, in its RoBERTa form, with several optimizers at equal budgets, and record every result.

    python recipes/glue/bert_to_roberta.py --output_dir runs/minilm
    python recipes/studies/minilm_study.py --model runs/minilm --data_dir DATA

DATA holds sst2, cola and rte as CSV files (`run.py --data_dir`). First every method's learning rate is looked for, on
one task with a seed of its own; then all tasks run at it with the other seeds. What minilm_study.jsonl has already is
not run again, so a study that was stopped goes on, and a method that is added to ROWS is all that runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import hf_lowrank


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.glue.comparison import Cell, Ledger, run_missing  # noqa: E402
from recipes.glue.settings import parse  # noqa: E402
from recipes.glue.tables import markdown  # noqa: E402
from recipes.glue.tasks import TASKS  # noqa: E402
from recipes.glue.training import train  # noqa: E402
from recipes.shared.common import machine  # noqa: E402
from recipes.studies.compare_tables import interval  # noqa: E402


FILE = Path(__file__).resolve().parent / "minilm_study.jsonl"

_TARGETS = "--optim_target_modules query,key,value,intermediate.dense,output.dense"
_RATES = (1e-4, 2e-4, 4e-4)


def _low_rank(method: str, rank: int = 8) -> tuple[str, tuple[float, ...]]:
    return f"--optim_args rank={rank},update_proj_gap=100,scale=2 {_TARGETS} --optim {method}", _RATES


def _lora(rank: int = 8) -> tuple[str, tuple[float, ...]]:
    adapters = f"--adapter_rank {rank} --adapter_alpha {rank} --adapter_dropout 0 --adapter_targets query,value"
    return f"--optim adamw_torch --baseline lora {adapters}", (1e-3, 2e-3, 4e-3)


ROWS = {
    "full fine-tuning": ("--optim adamw_torch", _RATES),
    "muon_4bit": (f"{_TARGETS} --optim muon_4bit", _RATES),
    "LoRA": _lora(),
    "LoRA, rank 4": _lora(4),
    "galore_dominant_adamw": _low_rank("galore_dominant_adamw"),
    "subtrack_adamw": _low_rank("subtrack_adamw"),
    **{
        f"{method}{'' if rank == 8 else f', rank {rank}'}": _low_rank(method, rank)
        for method in ("galore_i3s_adamw", "fira_adamw", "subtrack_pp_adamw", "alice_adamw")
        for rank in (8, 4)
    },
}
"""Options of a method, and the learning rates that are tried. Ranks are 8 where the name says nothing. SubTrack has
its default step: one on the scale of the gradient does not carry over to another model."""

BUDGET = {
    "cola": "--num_train_epochs 3 --per_device_train_batch_size 32",
    "rte": "--num_train_epochs 5 --per_device_train_batch_size 16",
    "sst2": "--num_train_epochs 1 --per_device_train_batch_size 16 --max_train_samples 10000",
}
COMMON = (
    "--max_seq_length 128 --lr_scheduler_type linear --warmup_steps 0.06 --train_sampling_strategy group_by_length "
    "--bf16 True --per_device_eval_batch_size 64 --save_strategy no --logging_steps 50 --report_to none "
    "--disable_tqdm True --dataloader_pin_memory False"
)
GRID_TASK, GRID_SEED = "cola", 0
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
    print(results_table(ledger, arguments.seeds) + "\n\n" + grid_table(ledger))


def study(ledger: Ledger, arguments: argparse.Namespace) -> None:
    """Run the grid, then the tasks, seed by seed, of every method there is."""
    where = ["--model_name_or_path", arguments.model, "--data_dir", arguments.data_dir]
    where += [] if torch.cuda.is_available() else ["--use_cpu", "True", "--attn_implementation", "eager"]
    hardware = machine()

    def train_there(command: list[str]) -> dict[str, Any]:
        return {**train(*parse([*command, *where])), "machine": hardware}

    def run(cells: list[Cell]) -> None:
        run_missing(cells, ledger, arguments.output_dir, train_there, record=True)

    rows = [row for row in arguments.rows if row not in absent()]
    for row in rows:
        search(row, ledger, run)
    for seed in arguments.seeds:
        rates = {row: rate for row in rows if (rate := best_rate(ledger, row)) is not None}  # not of one that failed
        run([cell(row, task, seed, rate) for task in BUDGET for row, rate in rates.items()])


def absent() -> set[str]:
    """Return the rows whose optimizer this version of hf_lowrank does not have."""
    return {row for row in ROWS if row.endswith("_adamw") and row not in hf_lowrank.METHODS}


def cell(row: str, task: str, seed: int, rate: float) -> Cell:
    """Return one training of the study."""
    options = f"--task {task} --learning_rate {rate:g} {ROWS[row][0]} {BUDGET[task]} {COMMON}"
    return Cell(row, task, seed, tuple(options.split()))


def search(row: str, ledger: Ledger, run: Callable[[list[Cell]], None]) -> None:
    """Try the learning rates of a method until the best is not at an edge."""
    rates = list(ROWS[row][1])
    while True:
        run([cell(row, GRID_TASK, GRID_SEED, rate) for rate in rates])
        best = best_rate(ledger, row)
        if best is None:  # what went wrong has been said
            return
        if min(rates) < best < max(rates) or len(rates) == MOST_RATES:
            return
        rates.append(best / 2 if best == min(rates) else best * 2)


def tried(ledger: Ledger, row: str) -> dict[float, float]:
    """Return the grid's score of every learning rate that was tried."""
    rates = [rate * 2.0**power for rate in ROWS[row][1][:1] for power in range(-MOST_RATES, 2 * MOST_RATES)]
    found = {rate: ledger.find(cell(row, GRID_TASK, GRID_SEED, rate)) for rate in rates}
    return {rate: main_score(result, GRID_TASK) for rate, result in found.items() if result}


def best_rate(ledger: Ledger, row: str) -> float | None:
    """Return the learning rate with the best score on the grid, or None if there is none."""
    scores = tried(ledger, row)
    return max(scores, key=lambda rate: scores[rate], default=None)


def main_score(result: dict[str, Any], task: str) -> float:
    """Return the task's main metric, times 100."""
    return 100 * next(iter(result["metrics"].values()))[TASKS[task].metrics[0]]


def results_table(ledger: Ledger, seeds: list[int]) -> str:
    """Return scores by method and task, means over seeds with 95 % intervals by Student's t, as Markdown."""
    head = ["", "lr", *(f"{TASKS[task].title} {TASKS[task].metrics[0].split('_')[0]}" for task in BUDGET)]
    head += ["mean", "seeds", "optimizer state, MiB"]
    lines = []
    for row in (row for row in ROWS if tried(ledger, row)):
        rate = best_rate(ledger, row)
        runs = {task: [ledger.find(cell(row, task, seed, rate)) for seed in seeds] for task in BUDGET}
        found = {task: [result for result in results if result] for task, results in runs.items()}
        if not any(found.values()):
            continue
        scores = {task: [main_score(result, task) for result in results] for task, results in found.items()}
        whole = f"{mean(map(mean, scores.values())):.1f}" if all(scores.values()) else "-"
        state = max(result["state_mib"] for result in ledger.results if result["row"] == row)
        counts = "/".join(str(len(values)) for values in scores.values())
        cells = [interval_text(values) for values in scores.values()]
        lines.append([row, f"{rate:g}", *cells, whole, counts, f"{state:.1f}"])
    return markdown(head, lines)


def interval_text(values: list[float]) -> str:
    """Return a mean with half of its interval; of one value the value, of none a dash."""
    if not values:
        return "-"
    middle, half = interval(values)
    return f"{middle:.1f}" + (f" ± {half:.1f}" if half < inf else "")


def grid_table(ledger: Ledger) -> str:
    """Return the score of every learning rate that was tried, as Markdown, the best in bold."""
    lines = []
    for row in ROWS:
        scores = tried(ledger, row)
        texts = [f"{rate:g}: {value:.1f}" for rate, value in sorted(scores.items())]
        best = max(scores.values(), default=0.0)
        texts = [f"**{text}**" if text.endswith(f": {best:.1f}") else text for text in texts]
        lines += [[row, ", ".join(texts)]] if texts else []
    return markdown(["", f"{TASKS[GRID_TASK].title} at each learning rate, seed {GRID_SEED}"], lines)


if __name__ == "__main__":
    main()
