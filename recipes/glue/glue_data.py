"""GLUE from the hub, or from CSV and TSV files with the hub's column names."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
from datasets import Dataset, load_dataset
from glue_tasks import TASKS, MistakeError, Task
from transformers import PreTrainedTokenizerBase


HUB = "nyu-mll/glue"
ENDINGS = (".csv", ".tsv")
VALIDATION = "validation"


def load(name: str, data_dir: str | None) -> dict[str, Dataset]:
    """Return the splits of a task: `train` and what it is validated on, with its columns of text and `label`.

    Args:
        name: a key of TASKS.
        data_dir: a folder with a folder per task, in it a train and a validation file that end in .csv or .tsv;
            None for the hub.

    Raises:
        MistakeError: if the data is not there or not as it should be.
    """
    task = TASKS[name]
    if data_dir is not None:
        return _load_files(task, Path(data_dir) / name)
    try:
        splits = load_dataset(HUB, name)
    except (OSError, ValueError) as error:  # ConnectionError is an OSError
        reason = str(error).splitlines()[0]
        raise MistakeError(
            f"cannot load {HUB} ({name}) from the hub ({reason}); give local files with --data_dir"
        ) from error
    return {split: splits[split].select_columns([*task.columns, "label"]) for split in ("train", *task.validation)}


def first_rows(rows: Dataset, count: int | None) -> Dataset:
    """Return the first `count` rows, or all."""
    return rows if count is None else rows.select(range(min(count, len(rows))))


def tokenize(rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Return token ids and labels; what is longer than `max_length` tokens is cut, the longer text of a pair first."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = [batch[column] for column in task.columns]
        return {**tokenizer(*texts, truncation=True, max_length=max_length), "labels": batch["label"]}

    return rows.map(encode, batched=True, remove_columns=rows.column_names, desc="tokenizing")


def _load_files(task: Task, folder: Path) -> dict[str, Dataset]:
    if not folder.is_dir():
        raise MistakeError(f"there is no folder {folder}; --data_dir names a folder with one folder per task")
    splits = {"train": _read(_file(folder, "train"), task)}
    for split in task.validation:
        # A task with two validation sets may have one local file for both names, or only the first.
        file = _file(folder, split, *([VALIDATION] if split == task.validation[0] else []), missing_ok=True)
        if file is not None:
            splits[split] = _read(file, task)
    if task.validation[0] not in splits:
        raise MistakeError(f"{folder} has no {task.validation[0]}.csv or {task.validation[0]}.tsv")
    return splits


def _file(folder: Path, *stems: str, missing_ok: bool = False) -> Path | None:
    for path in (folder / f"{stem}{ending}" for stem in stems for ending in ENDINGS):
        if path.is_file():
            return path
    if missing_ok:
        return None
    raise MistakeError(f"{folder} has no {stems[0]}.csv or {stems[0]}.tsv")


def _read(file: Path, task: Task) -> Dataset:
    tabs = file.suffix == ".tsv"
    # GLUE's TSV files do not quote; texts such as "null" and "NA" are texts.
    style = {"sep": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    try:
        table = pd.read_csv(file, keep_default_na=False, **style)
    except pd.errors.EmptyDataError:
        raise MistakeError(f"{file} is empty") from None
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise MistakeError(f"{file} cannot be read as {file.suffix[1:].upper()}: {error}") from error
    wanted = [*task.columns, "label"]
    missing = [column for column in wanted if column not in table.columns]
    if missing:
        found = ", ".join(map(str, table.columns))
        raise MistakeError(f"{file} lacks the column {' and '.join(missing)}; it has {found}")
    if table.empty:
        raise MistakeError(f"{file} has no rows below its header")
    return Dataset.from_dict(
        {**{c: table[c].astype(str).tolist() for c in task.columns}, "label": _labels(table, task, file)}
    )


def _labels(table: pd.DataFrame, task: Task, file: Path) -> list[int] | list[float]:
    """Return the labels as numbers: classes 0, 1, ... or the regression's target."""
    numbers = pd.to_numeric(table["label"], errors="coerce")
    good = numbers.notna() if task.labels == 1 else numbers.isin(range(task.labels))
    if not good.all():
        valid = "a number" if task.labels == 1 else f"one of {', '.join(map(str, range(task.labels)))}"
        row = int((~good).idxmax())
        found = str(table["label"][row])
        raise MistakeError(f"{file}: the label of row {row + 1} is {found!r}; {task.title} wants {valid}")
    return numbers.astype(float if task.labels == 1 else int).tolist()
