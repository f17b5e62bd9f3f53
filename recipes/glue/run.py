"""Fine-tune an encoder on GLUE with any optimizer of the Trainer, those of hf_lowrank included.

One training, from a file of settings, from options, or from both (what comes later wins):

    python recipes/glue/run.py recipes/glue/configs/galore_r4/cola.yaml --seed 2
    python recipes/glue/run.py --task cola --optim galore_i3s_adamw --optim_args rank=8,scale=2 --learning_rate 2e-5

A comparison, with --task all, several tasks, --rows or --seeds, ends with the papers' tables:

    python recipes/glue/run.py --task all --rows full lora_r4 galore_r4 subtrack_r4 galore_r4:fira_adamw --seeds 1 2 3

A row is a folder of settings, one file per task: a name below configs/ or a path. After a colon stands another
optimizer or a --baseline for the same settings. Other options go to every training. Results are kept in
OUTPUT_DIR/results.jsonl: what is there already is not run again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hf_lowrank


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.glue import data, papers  # noqa: E402
from recipes.glue.comparison import Cell, Ledger, run_missing  # noqa: E402
from recipes.glue.settings import USAGE, expand, parse, row_settings  # noqa: E402
from recipes.glue.tables import tables  # noqa: E402
from recipes.glue.tasks import TASKS, task_named  # noqa: E402
from recipes.glue.training import GlueArguments, train  # noqa: E402


def main(argv: Sequence[str] | None = None) -> None:
    """Train once or compare, as the command line says."""
    hf_lowrank.register()
    options = expand(sys.argv[1:] if argv is None else argv)
    comparison, rest = comparison_parser().parse_known_args(options)
    if comparison.rows or comparison.seeds or len(comparison.task) > 1 or "all" in comparison.task:
        compare(comparison, rest)
    else:
        train_once(options)


def train_once(options: list[str]) -> None:
    """Train, and print the results."""
    arguments = parse(options, description=__doc__)
    result = train(*arguments)
    if arguments[-1].process_index == 0:
        print("\n".join(f"{name}: {value}" for name, value in result.items()))


def comparison_parser() -> argparse.ArgumentParser:
    """Return the parser of the options that make a comparison; all others go to its trainings."""
    parser = argparse.ArgumentParser(usage=USAGE, allow_abbrev=False, add_help=False)
    parser.add_argument("--task", nargs="+", default=[])
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[])
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=Path("runs/glue"))
    return parser


def compare(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run what is missing of a comparison and print its tables, which are also left in `tables.md`."""
    tasks = list(TASKS) if not arguments.task or "all" in arguments.task else arguments.task
    for task in tasks:
        task_named(task)
    cells = [
        Cell(row, task, seed, (*row_settings(row, task), *rest))
        for seed in arguments.seeds or [1234]
        for row in arguments.rows or papers.ROWS
        for task in tasks
    ]
    folder = arguments.output_dir
    ledger = Ledger(folder / "results.jsonl")
    # Everything is looked at before anything is trained.
    parsed = [parse(cell.command(folder)) for cell in cells]
    for task, data_dir in {(glue.task, glue.data_dir) for glue, _, _ in parsed if glue.data_dir}:
        data.load(task, data_dir)
    main_process = parsed[0][-1].process_index == 0
    failed = run_missing(cells, ledger, folder, lambda line: train(*parse(line)), record=main_process)
    if main_process:
        seeds = sorted({cell.seed for cell in cells})
        note = measured_on(parsed[0][0], seeds, rest)
        text = tables(ledger.of(cells), model=parsed[0][0].model_name_or_path, note=note)
        (folder / "tables.md").write_text(text)
        print(f"\n{text}")
    if failed:
        sys.exit(1)


def measured_on(glue: GlueArguments, seeds: list[int], rest: list[Any]) -> str:
    """Return what the numbers were measured on, to stand below the tables."""
    return (
        f"Model {glue.model_name_or_path}, data {glue.data_dir or data.HUB}, validation sets after the last "
        f"step, seeds {', '.join(map(str, seeds))} (mean ± standard deviation where there are several). Options "
        f"beside the rows' own: {' '.join(rest) or 'none'}."
    )


if __name__ == "__main__":
    main()
