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
from typing import Any, get_args, get_type_hints

import glue_data
import yaml
from glue_comparison import Cell, Ledger, run_missing
from glue_tables import tables
from glue_tasks import TASKS, MistakeError, task_named
from glue_training import BaselineArguments, GlueArguments, train
from transformers import HfArgumentParser, TrainingArguments

import hf_lowrank


CONFIGS = Path(__file__).resolve().parent / "configs"
USAGE = "run.py [SETTINGS.yaml ...] [--task TASK] [options]; --help lists them all"


def main(argv: Sequence[str] | None = None) -> None:
    """Train once or compare, as the command line says."""
    hf_lowrank.register()
    try:
        options = expand(sys.argv[1:] if argv is None else argv)
        comparison, rest = comparison_parser().parse_known_args(options)
        if is_comparison(comparison):
            compare(comparison, rest)
        else:
            result = train(*parse(options))
            print("\n".join(f"{name}: {value}" for name, value in result.items()))
    except MistakeError as mistake:
        sys.stderr.write(f"run.py: {mistake}\n")
        sys.exit(2)


def expand(argv: Sequence[str]) -> list[str]:
    """Return a command line with every file of settings replaced by what is in it."""
    options: list[str] = []
    for word in argv:
        options += settings(Path(word)) if word.endswith((".yaml", ".yml")) else [word]
    return options


def settings(file: Path) -> list[str]:
    """Return the content of a YAML file as options of a command line."""
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise MistakeError(f"cannot read the settings {file}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise MistakeError(f"{file} holds no settings: it wants lines such as `task: cola`")
    return [word for name, value in content.items() for word in (f"--{name}", str(value))]


def parse(options: Sequence[str]) -> tuple[GlueArguments, BaselineArguments, TrainingArguments]:
    """Return the arguments of one training."""
    parser = HfArgumentParser(
        (GlueArguments, BaselineArguments, TrainingArguments),
        usage=USAGE,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    try:
        glue, baseline, args = parser.parse_args_into_dataclasses(list(options))
    except (ValueError, ImportError) as error:  # TrainingArguments refuses a value
        raise MistakeError(str(error)) from error
    task_named(glue.task)
    return glue, baseline, args


def comparison_parser() -> argparse.ArgumentParser:
    """Return the parser of the options that make a comparison; all others go to its trainings."""
    parser = argparse.ArgumentParser(usage=USAGE, allow_abbrev=False, add_help=False)
    parser.add_argument("--task", nargs="+", default=[])
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/glue"))
    return parser


def is_comparison(arguments: argparse.Namespace) -> bool:
    """Tell whether the command line asks for several trainings."""
    return bool(arguments.rows or arguments.seeds or len(arguments.task) > 1 or "all" in arguments.task)


def compare(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Run what is missing of a comparison and print its tables, which are also left in `tables.md`."""
    tasks = list(TASKS) if not arguments.task or "all" in arguments.task else arguments.task
    for task in tasks:
        task_named(task)
    rows = arguments.rows or sorted(folder.name for folder in CONFIGS.iterdir())
    cells = [
        Cell(row, task, seed, (*row_settings(row, task), *rest))
        for seed in arguments.seeds or [1234]
        for row in rows
        for task in tasks
    ]
    ledger = Ledger(arguments.output_dir / "results.jsonl")
    # Everything is looked at before anything is trained.
    parsed = [parse(cell.command(arguments.output_dir)) for cell in cells]
    for task, folder in {(glue.task, glue.data_dir) for glue, _, _ in parsed if glue.data_dir}:
        glue_data.load(task, folder)
    main_process = parsed[0][2].process_index == 0
    failed = run_missing(
        cells, ledger, arguments.output_dir, lambda command: train(*parse(command)), record=main_process
    )
    if main_process:
        text = tables(ledger.runs(cells), model=parsed[0][0].model_name_or_path, note=measured_on(parsed, rest))
        (arguments.output_dir / "tables.md").write_text(text)
        print(f"\n{text}")
    if failed:
        sys.exit(1)


def row_settings(row: str, task: str) -> list[str]:
    """Return the options of a row of the tables for a task.

    Raises:
        MistakeError: if the row has no settings for it.
    """
    name, _, other = row.partition(":")
    folder = CONFIGS / name if (CONFIGS / name).is_dir() else Path(name)
    file = folder / f"{task}.yaml"
    if not file.is_file():
        valid = ", ".join(sorted(folder.name for folder in CONFIGS.iterdir()))
        raise MistakeError(f"row {row!r} has no settings {file}; rows are {valid}, or folders of your own")
    baselines = get_args(get_args(get_type_hints(BaselineArguments)["baseline"])[0])
    return [*settings(file), *([] if not other else ["--baseline" if other in baselines else "--optim", other])]


def measured_on(parsed: list[tuple[GlueArguments, Any, Any]], rest: list[str]) -> str:
    """Return a sentence on model, data and changed settings, to stand below the tables."""
    glue = parsed[0][0]
    seeds = sorted({args.seed for _, _, args in parsed})
    samples = f", the first {glue.max_train_samples} training rows" if glue.max_train_samples else ""
    return (
        f"Model {glue.model_name_or_path}; data {glue.data_dir or glue_data.HUB}{samples}; validation sets after the "
        f"last step; seeds {', '.join(map(str, seeds))}; mean ± standard deviation over seeds. "
        f"Options beside the rows' own: {' '.join(rest) or 'none'}."
    )


if __name__ == "__main__":
    main()
