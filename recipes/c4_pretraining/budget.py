"""How long to train, on how much at once; what must be true of the numbers; and what is measured at the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from transformers import EvalPrediction, TrainingArguments

from recipes.c4_pretraining.data import MEASURED_ROWS, DataArguments
from recipes.c4_pretraining.models import ModelArguments
from recipes.shared.common import require_at_least, stop


@dataclass
class BudgetArguments:
    """How much is trained on."""

    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows per step over all processes; sets gradient_accumulation_steps. (The papers: 512.)"},
    )
    train_tokens: float | None = field(
        default=None,
        metadata={
            "help": "Tokens to train on, padding not counted; sets max_steps, by the mean length of the first "
            f"{MEASURED_ROWS} rows. --max_steps wins."
        },
    )
    warmup_share: float = field(
        default=0.1,
        metadata={"help": "Warm-up as a share of all steps, where --warmup_steps gives none; 0: no warm-up at all."},
    )


def check_numbers(
    model: ModelArguments, text: DataArguments, budget: BudgetArguments, args: TrainingArguments
) -> None:
    """End with one sentence where a number makes no sense."""
    require_at_least(0, matrix_learning_rate=model.matrix_learning_rate, warmup_share=budget.warmup_share)
    require_at_least(1, eval_tokens=text.eval_tokens, shuffle_documents=text.shuffle_documents)
    require_at_least(1, total_batch_size=budget.total_batch_size, train_tokens=budget.train_tokens)
    require_at_least(1, per_device_train_batch_size=args.per_device_train_batch_size)
    require_at_least(2, block_size=text.block_size)  # the first token of a row is not predicted
    if args.dataloader_num_workers > 1:
        stop("--dataloader_num_workers must be 0 or 1: several workers would each read the whole stream")
    if budget.warmup_share > 1:
        stop(f"--warmup_share must be at most 1, not {budget.warmup_share:g}")


def set_accumulation(budget: BudgetArguments, args: TrainingArguments) -> None:
    """Set gradient_accumulation_steps so that a step takes total_batch_size rows; require a length."""
    if args.max_steps <= 0 and not budget.train_tokens:
        stop("say how long to train: --max_steps or --train_tokens")
    if budget.total_batch_size is None:
        return
    at_once = args.train_batch_size * args.world_size
    if budget.total_batch_size % at_once:
        stop(
            f"--total_batch_size {budget.total_batch_size} is no multiple of the {at_once} rows that all processes "
            "take at once; change --per_device_train_batch_size"
        )
    args.gradient_accumulation_steps = budget.total_batch_size // at_once


def rows_per_step(args: TrainingArguments) -> int:
    """Return the rows that one step takes, over all processes."""
    return int(args.train_batch_size * args.world_size * args.gradient_accumulation_steps)


def set_steps(
    budget: BudgetArguments, args: TrainingArguments, tokens_per_row: float, data_args: DataArguments
) -> None:
    """Set max_steps from the budget in tokens, and the warm-up from its share."""
    require_text(tokens_per_row, int(tokens_per_row > 0), data_args, "training")
    if args.max_steps <= 0:
        args.max_steps = math.ceil(budget.train_tokens / (rows_per_step(args) * tokens_per_row))
    if not args.warmup_steps and not getattr(args, "warmup_ratio", 0):
        args.warmup_steps = round(budget.warmup_share * args.max_steps)


def require_text(tokens: float, rows: int, args: DataArguments, what: str) -> None:
    """End where there is nothing to predict."""
    if rows == 0 and args.packing:
        stop(f"the {what} text has fewer than {args.block_size} tokens, which is one row (--block_size)")
    if tokens <= rows:  # a row's first token is not predicted
        stop(f"the {what} text holds no words")


class Perplexity:
    """`compute_metrics` of the Trainer, from the (sum of -log p, tokens) of every row.

    perplexity: exp of the mean over all predicted tokens, each with the same weight.

    papers_evaluator_perplexity: what the evaluation loop published with GaLore, and used by its successors, would
    report. It takes the mean over batches of the batch means, and its batch counter starts at one: of N batches it
    divides the sum by N + 1, so that the loss is too small by the factor N / (N + 1). For comparing with published
    numbers alone.

    Args:
        batch_size: rows in a batch of the papers' evaluator.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return both perplexities."""
        sums = prediction.predictions.astype(np.float64)  # (rows, 2)
        total, tokens = sums.sum(0)
        batches = [sums[i : i + self.batch_size].sum(0) for i in range(0, len(sums), self.batch_size)]
        means = [batch_total / batch_tokens for batch_total, batch_tokens in batches if batch_tokens]
        return {
            "perplexity": _exp(total / tokens),
            "papers_evaluator_perplexity": _exp(sum(means) / (len(means) + 1)),
        }


def _exp(loss: float) -> float:
    return float(np.exp(min(loss, 700.0)))
