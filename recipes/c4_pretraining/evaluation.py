"""Perplexity over tokens, and as the papers' evaluator reports it."""

from __future__ import annotations

import numpy as np
from transformers import EvalPrediction


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
