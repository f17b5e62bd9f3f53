"""One training of compare_methods.py: the text in three parts, the model, the optimizer, the loop."""

from __future__ import annotations

import math
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from hf_lowrank import LowRankOptimizer, param_groups, target_parameters
from hf_lowrank.methods.resolve import Config
from recipes.quickstart.run_clm import Blocks, ModelArguments, llama_config
from recipes.shared.baselines import BaselineArguments, adapter_parameters, add_lora_
from recipes.shared.common import load_bpe, machine, sizes, speeches, state_bytes
from recipes.studies.compare_rows import FIXED, LORA, ROWS, Point, Row


SIZES = {
    "tiny": ModelArguments(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2),
    "narrow": ModelArguments(hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4),
    "small": ModelArguments(hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4),
    "large": ModelArguments(hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4),
}
"""`narrow`, `small` and `large` have 0.20, 0.79 and 3.21 M parameters in the body, and 0.07, 0.13 and 0.26 M in
embeddings and head; `tiny` is there to try the commands."""

VOCABULARY, BLOCK, BATCH, GAP, HELD_OUT_BLOCKS = 512, 128, 8, 100, 512
TUNING_SEED = 1
SETTING = (
    f"sotu; vocabulary {VOCABULARY}, fp32, {BATCH} x {BLOCK} tokens, rank a quarter of the width, gap {GAP}, "
    f"clipping 1, cosine, 10 % warm-up, {HELD_OUT_BLOCKS} blocks of each held-out text"
)
"""What is the same for all runs; part of every record, so that a change of it makes new ones."""


@dataclass(frozen=True)
class Run:
    """One training: a row at a point, for a size of the model, a number of steps and a seed."""

    row: Row
    point: Point
    size: str
    steps: int
    seed: int

    @property
    def key(self) -> dict[str, Any]:
        """What tells its record from others."""
        where = {"point": list(self.point), **self.point.values(self.row), "seed": self.seed}
        return {**study_key(self.row, self.size, self.steps), **where}


def study_key(row: Row, size: str, steps: int) -> dict[str, Any]:
    """Return what the records of one row's search have in common."""
    common = {"size": size, "steps": steps, "setting": SETTING}
    return {"row": row.name, "method": row.method, "options": options(row, size), **common}


class Text(NamedTuple):
    """Blocks to train on, to tune on and to score on, from different speeches, and the tokenizer of the first."""

    tokenizer: PreTrainedTokenizerFast
    training: Blocks
    tuning: Blocks
    scoring: Blocks


@cache
def read() -> Text:
    """Return the speeches; of those that are held out by turns one is for tuning and one for the score."""
    training, held_out = speeches()
    tokenizer = load_bpe(training, VOCABULARY, Path(tempfile.gettempdir()))
    parts = (Blocks.pack(part, tokenizer, BLOCK) for part in (training, held_out[::2], held_out[1::2]))
    train, tune, score = parts
    return Text(tokenizer, train, tune.spread(HELD_OUT_BLOCKS), score.spread(HELD_OUT_BLOCKS))


def options(row: Row, size: str) -> dict[str, Any]:
    """Return the options of a row that it is trained with: the fixed ones, rank and gap, its own."""
    rank = {"rank": SIZES[size].hidden_size // 4} if row.ranked else {}
    if row.method == LORA:
        return {**rank, **row.options}
    has_gap = "update_proj_gap" in Config.of(row.method, row.options, model=True).options
    gap = {"update_proj_gap": GAP} if has_gap and "update_proj_gap" not in row.defaults else {}  # LDAdam's is 1
    return {**(FIXED if row.fixed else {}), **rank, **gap, **row.options}


def train(run: Run, text: Text) -> dict[str, Any]:
    """Train one model.

    Returns:
        Losses in nats per token: `train_loss`, the mean of the last 50 steps; `tune_loss`; and for seeds that tune
        nothing `score_loss`. All are None for a run that diverged. `matrix_bytes`: state per element of the matrices;
        `state_bytes`: in all. Milliseconds of the optimizer's step, number of refreshes of all matrices, seconds.
    """
    start = time.perf_counter()
    torch.manual_seed(run.seed)
    model = LlamaForCausalLM(llama_config(SIZES[run.size], text.tokenizer, BLOCK))
    counts, elements = sizes(model), matrix_elements(model)
    optimizer, matrices = optimizer_of(run, model)
    losses, milliseconds = fit_(model, optimizer, run, text.training)
    held_out = {"tune_loss": text.tuning} | ({} if run.seed == TUNING_SEED else {"score_loss": text.scoring})
    found = {name: held_out_loss(model, blocks) for name, blocks in held_out.items()}
    found["train_loss"] = mean(losses[-50:])
    diverged = not all(map(math.isfinite, found.values()))
    return {
        **(dict.fromkeys(found) if diverged else found),
        "matrix_bytes": sum(x.nbytes for p in matrices for x in optimizer.state[p].values()) / elements,
        "state_bytes": state_bytes(optimizer),
        **counts,
        "optimizer_ms_median": median(milliseconds),
        "optimizer_ms_mean": mean(milliseconds),
        "refreshes": getattr(optimizer, "refreshes_here", 0),
        "seconds": time.perf_counter() - start,
        "machine": machine(),
    }


def optimizer_of(run: Run, model: nn.Module) -> tuple[Optimizer, list[Tensor]]:
    """Return the optimizer of a model, and the parameters that stand for its matrices; LoRA changes the model.

    The matrices have the rate, the betas and the decay of the point; all else has the other rate, betas (0.9, 0.999)
    and no decay.
    """
    row, values, given = run.row, run.point.values(run.row), options(run.row, run.size)
    lora = row.method == LORA
    groups = lora_groups(model, given["rank"]) if lora else param_groups(model, method=row.method, **given)
    unit = 1.0 if lora else row.unit or Config.of(row.method, given, model=True).options["scale"]
    for group in groups:
        of_matrices = {"lr": values["matrix_rate"] / unit, "weight_decay": values["decay"] * unit}
        of_others = {"lr": values["other_rate"], "weight_decay": 0.0, "betas": (0.9, 0.999)}
        group |= {**of_matrices, "betas": tuple(values["betas"])} if "rank" in group else of_others
    optimizer = AdamW(groups) if lora else LowRankOptimizer(groups, row.method, seed=run.seed)
    if not lora:
        optimizer.tell(total_steps=run.steps)
    return optimizer, [p for group in optimizer.param_groups if "rank" in group for p in group["params"]]


def lora_groups(model: nn.Module, rank: int) -> list[dict[str, Any]]:
    """Put adapters on all matrices, which freezes these; return the groups of the factors and of all else."""
    targets = [name.removesuffix(".weight") for name in target_parameters(model, rank=1)]
    arguments = BaselineArguments(adapter_rank=rank, adapter_alpha=rank, adapter_dropout=0.0)
    add_lora_(model, targets, arguments, also_train=".*")
    factors, trained = {*adapter_parameters(model)}, [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inside, outside = ([p for name, p in trained if (name in factors) == where] for where in (True, False))
    return [{"params": inside, "rank": rank}, {"params": outside}]


def matrix_elements(model: nn.Module) -> int:
    """Return how many numbers the matrices of the body have."""
    return sum(model.get_parameter(name).numel() for name in target_parameters(model, rank=1))


def fit_(model: nn.Module, optimizer: Optimizer, run: Run, blocks: Blocks) -> tuple[list[float], list[float]]:
    """Train; return the loss of every step and the milliseconds of every update. A loss that is not finite ends it."""
    schedule = get_cosine_schedule_with_warmup(optimizer, run.steps // 10, run.steps)
    losses, milliseconds, order = [], [], batches(len(blocks), run.seed)
    model.train()
    for _ in range(run.steps):
        rows = blocks.rows[next(order)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        start = time.perf_counter()
        optimizer.step()
        milliseconds.append(1e3 * (time.perf_counter() - start))
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    return losses, milliseconds


def batches(count: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of one batch after another, every epoch in a new order; the rest of an epoch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (batch for batch in torch.randperm(count, generator=generator).split(BATCH) if len(batch) == BATCH)


@torch.no_grad()
def held_out_loss(model: nn.Module, blocks: Blocks) -> float:
    """Return the mean loss of the blocks, nats per token."""
    model.eval()
    parts = [(len(rows), model(input_ids=rows, labels=rows).loss.item()) for rows in blocks.rows.split(32)]
    return sum(count * loss for count, loss in parts) / len(blocks)


def at_bytes(row: Row, size: str, budget: float) -> Row | None:
    """Return a row with the largest rank whose state of the matrices fits a budget.

    Args:
        row: the row; one without a rank to choose is returned as it is, if it fits.
        size: of the model.
        budget: bytes per element of the matrices.

    Returns:
        The row, its rank in its name; None if it does not fit.
    """
    if not row.ranked:
        return row if declared_bytes(row, size) <= budget else None
    ranks = range(1, SIZES[size].hidden_size)
    fitting = bisect_right(ranks, budget, key=lambda rank: declared_bytes(with_rank(row, rank), size))
    return with_rank(row, ranks[fitting - 1]) if fitting else None


def with_rank(row: Row, rank: int) -> Row:
    """Return a row with another rank, which is in its name."""
    options = {**row.options, "rank": rank}
    origin = row.name if row.name in ROWS else row.origin
    return replace(row, name=f"{row.name}, rank {rank}", options=options, origin=origin)


def declared_bytes(row: Row, size: str) -> float:
    """Return the bytes of state per element of the matrices, known before the first step."""
    config = llama_config(SIZES[size], read().tokenizer, BLOCK)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    elements = matrix_elements(model)
    optimizer, matrices = optimizer_of(Run(row, Point(), size, 1, 0), model)
    if row.method == LORA:
        return sum(8 * p.numel() + 4 for p in matrices) / elements  # torch's AdamW: two moments, a count of steps
    kept = {id(p) for p in matrices}
    return sum(plan.nbytes for _, p, _, plan in optimizer.declared() if id(p) in kept) / elements
