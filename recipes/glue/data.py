"""GLUE from the hub, or from CSV and TSV files with the hub's column names."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from recipes.glue.tasks import TASKS, Task
from recipes.shared.common import stop


HUB = "nyu-mll/glue"
ENDINGS = (".csv", ".tsv")
VALIDATION = "validation"


def load(name: str, data_dir: str | None) -> dict[str, Dataset]:
    """Return the splits of a task: `train` and what it is validated on, with its columns of text and `label`.

    Args:
        name: a key of TASKS.
        data_dir: a folder with a folder per task, in it a train and a validation file that end in .csv or .tsv;
            None for the hub.

    Ends with one sentence if the data is not there or not as it should be.
    """
    task = TASKS[name]
    if data_dir is not None:
        return _load_files(task, Path(data_dir) / name)
    try:
        splits = load_dataset(HUB, name)
    except (OSError, ValueError) as error:  # ConnectionError is an OSError
        reason = str(error).splitlines()[0]
        stop(f"cannot load {HUB} ({name}) from the hub ({reason}); give local files with --data_dir")
    return {split: splits[split].select_columns([*task.columns, "label"]) for split in ("train", *task.validation)}


def first_rows(rows: Dataset, count: int | None) -> Dataset:
    """Return the first `count` rows, or all."""
    return rows if count is None else rows.select(range(min(count, len(rows))))


def tokenize(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Return token ids and labels; what is longer than `max_length` tokens is cut, the longer text of a pair first."""
    max_length = min(max_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[column] for column in task.columns]
        return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": batch["label"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="tokenizing")


def _load_files(task: Task, folder: Path) -> dict[str, Dataset]:
    if not folder.is_dir():
        stop(f"there is no folder {folder}; --data_dir names a folder with one folder per task")
    main = task.validation[0]
    splits = {}
    for split in ("train", *task.validation):
        stems = (split, VALIDATION) if split == main else (split,)
        paths = [folder / f"{stem}{ending}" for stem in stems for ending in ENDINGS]
        file = next((path for path in paths if path.is_file()), None)
        if file is not None:
            splits[split] = _read(file, task)
        elif split in ("train", main):  # a second validation set may be missing
            stop(f"{folder} has no {stems[-1]}.csv or {stems[-1]}.tsv")
    return splits


def _read(file: Path, task: Task) -> Dataset:
    tabs = file.suffix == ".tsv"
    # GLUE's TSV files do not quote; texts such as "null" and "NA" are texts.
    style = {"sep": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    try:
        table = pd.read_csv(file, keep_default_na=False, **style)
    except pd.errors.EmptyDataError:
        stop(f"{file} is empty")
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        stop(f"{file} cannot be read as {file.suffix[1:].upper()}: {error}")
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the first fields of longer rows as an index
        stop(f"{file} has rows of more fields than its header has columns; quote texts that hold a separator")
    wanted = [*task.columns, "label"]
    missing = [column for column in wanted if column not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns))
        stop(f"{file} lacks the column {' and '.join(missing)}; it has {found}")
    if table.empty:
        stop(f"{file} has no rows below its header")
    return Dataset.from_dict(
        {**{c: table[c].astype(str).tolist() for c in task.columns}, "label": _labels(table, task, file)}
    )


def _labels(table: pd.DataFrame, task: Task, file: Path) -> list[int] | list[float]:
    """Return the labels as numbers: classes 0, 1, ... or the regression's target."""
    numbers = pd.to_numeric(table["label"], errors="coerce")
    good = np.isfinite(numbers) if task.labels == 1 else numbers.isin(range(task.labels))
    if not good.all():
        valid = "a number" if task.labels == 1 else f"one of {', '.join(map(str, range(task.labels)))}"
        row = int((~good).idxmax())
        found = str(table["label"][row])
        stop(f"{file}: the label of row {row + 1} is {found!r}; {task.title} wants {valid}")
    return numbers.astype(float if task.labels == 1 else int).tolist()
