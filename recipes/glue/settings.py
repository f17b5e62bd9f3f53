"""Settings: YAML files and command lines become the arguments of a training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import TrainingArguments

from hf_lowrank.layer_sampling import RULES
from recipes.glue.tasks import task_named
from recipes.glue.training import GlueArguments
from recipes.shared.baselines import BASELINES, BaselineArguments
from recipes.shared.common import ArgumentParser, stop


CONFIGS = Path(__file__).resolve().parent / "configs"
USAGE = "run.py [SETTINGS.yaml ...] [--task TASK] [options]; --help lists them all"


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
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        stop(f"cannot read the settings {file}: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        stop(f"{file} holds no settings: it wants lines such as `task: cola`")
    return [word for name, value in content.items() for word in (f"--{name}", str(value))]


def parse(
    options: Sequence[str], description: str | None = None
) -> tuple[GlueArguments, BaselineArguments, TrainingArguments]:
    """Return the arguments of one training, or end with one sentence and exit code 2."""
    parser = ArgumentParser(
        (GlueArguments, BaselineArguments, TrainingArguments),
        usage=USAGE,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    try:
        glue, baseline, args = parser.parse_args_into_dataclasses(list(options))
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        stop(" ".join(str(error).split()))
    task_named(glue.task)
    return glue, baseline, args


def rows() -> list[str]:
    """Return the rows of the tables that there are settings for."""
    return sorted(folder.name for folder in CONFIGS.iterdir())


def row_settings(row: str, task: str) -> list[str]:
    """Return the options of a row of the tables for a task.

    Args:
        row: a folder of settings, below configs/ or a path; after a colon another optimizer, a baseline or a rule of
            layer sampling for them.
        task: a key of TASKS.

    Ends with one sentence if the row has no settings for the task.
    """
    name, _, other = row.partition(":")
    folder = CONFIGS / name if name and (CONFIGS / name).is_dir() else Path(name)
    file = folder / f"{task}.yaml"
    if not file.is_file():
        stop(f"row {row!r}: there is no file {file}; rows are {', '.join(rows())}, or folders of your own")
    options = settings(file)
    if other in RULES:  # beside the options that the optimizer has
        given = options[options.index("--optim_args") + 1] if "--optim_args" in options else ""
        return [*options, "--optim_args", ",".join(filter(None, [given, f"layer_sampling={other}"]))]
    flag = "--baseline" if other in BASELINES else "--optim"
    return [*options, *([flag, other] if other else [])]
