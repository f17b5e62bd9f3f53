"""The stream of training rows: it can be saved and continued at the exact row. Batches, and rows held out."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback, TrainingArguments

from recipes.shared.common import StepTimer


STREAM_FILE = "stream.json"
"""In a checkpoint: the position of the stream after the rows that had been trained on."""


class TokenStream(IterableDataset):
    """Rows without end, epoch after epoch, that know where they are.

    The loader runs ahead of the training, so the positions after the last few steps are kept and looked up by step.

    Args:
        build: makes the rows of an epoch from its number.
        rows_per_step: rows that one step of training takes, over all processes.
    """

    def __init__(self, build: Callable[[int], datasets.IterableDataset], *, rows_per_step: int) -> None:
        self.build = build
        self.rows_per_step = rows_per_step
        self.start: dict[str, Any] = {"step": 0, "tokens": 0, "epoch": 0, "source": None}
        self.positions: deque[dict[str, Any]] = deque(maxlen=8)

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        position, rows = dict(self.start), 0
        while True:
            source = self.build(position["epoch"])
            if position["source"] is not None:
                source.load_state_dict(position["source"])
            for row in source:
                rows += 1
                position["tokens"] += len(row["input_ids"])
                if rows % self.rows_per_step == 0:
                    position["step"] += 1
                    self.positions.append({**position, "source": source.state_dict()})
                yield row
            position |= {"epoch": position["epoch"] + 1, "source": None}

    def position(self, step: int) -> dict[str, Any] | None:
        """Return the position after a step, or None if it is not known (a loader with workers of its own)."""
        return next((p for p in self.positions if p["step"] == step), None)


class StreamCallback(TrainerCallback):
    """Keeps the position of the stream in every checkpoint; adds tokens and seconds of training to the logs.

    Seconds are those of the steps: loading, evaluation and saving aside. They go on where a resumed run stopped.

    Args:
        stream: the training stream.
        timer: times the steps.
    """

    def __init__(self, stream: TokenStream, timer: StepTimer) -> None:
        self.stream = stream
        self.timer = timer
        self.seconds_before = 0.0
        self.before_first_step: Callable[[], None] | None = None

    def seconds(self) -> float:
        """Return the seconds of training so far."""
        return self.seconds_before + self.timer.total_seconds

    def on_step_begin(self, *unused: Any, **kwargs: Any) -> None:
        """Do once what `before_first_step` holds."""
        if self.before_first_step is not None:
            self.before_first_step()
            self.before_first_step = None

    def on_log(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Add what is known to the log history, of trainings and of evaluations."""
        if state.log_history and state.is_world_process_zero:
            position = self.stream.position(state.global_step)
            more = {"tokens": position["tokens"]} if position else {}
            state.log_history[-1].update(seconds=round(self.seconds(), 3), **more)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the position beside the model."""
        position = self.stream.position(state.global_step)
        if position and state.is_world_process_zero:
            file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STREAM_FILE
            unfinished = file.with_suffix(".tmp")
            unfinished.write_text(json.dumps({**position, "seconds": self.seconds()}))
            unfinished.replace(file)

    def resume(self, checkpoint: str) -> bool:
        """Continue at a checkpoint's position; False if it has none, and the Trainer must read up to it."""
        file = Path(checkpoint) / STREAM_FILE
        if not file.exists():
            return False
        position = json.loads(file.read_text())
        self.seconds_before = position.pop("seconds")
        self.stream.start = position
        self.stream.positions.append(position)  # for logs before the first new step
        return True


class Collator:
    """Rows to a batch: padded to block_size; padding has the label -100, which the loss leaves out.

    There is no attention mask: padding comes last, and a causal model does not look ahead.
    """

    def __init__(self, *, block_size: int, padding: int) -> None:
        self.block_size = block_size
        self.padding = padding

    def __call__(self, batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return input_ids and labels, (rows, block_size) each."""
        shape = (len(batch), self.block_size)
        input_ids, labels = torch.full(shape, self.padding), torch.full(shape, -100)
        for i, row in enumerate(batch):
            tokens = torch.tensor(row["input_ids"])
            input_ids[i, : len(tokens)] = labels[i, : len(tokens)] = tokens
        return {"input_ids": input_ids, "labels": labels}


class HeldOut(Dataset):
    """Rows for validation, in memory: from the beginning, until there are `tokens` tokens."""

    def __init__(self, source: datasets.IterableDataset, *, tokens: int) -> None:
        self.rows: list[np.ndarray] = []
        self.tokens = 0
        for row in source:
            self.rows.append(np.asarray(row["input_ids"], dtype=np.int32))
            self.tokens += len(row["input_ids"])
            if self.tokens >= tokens:
                break

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": self.rows[index].tolist()}
