"""Accuracy for `evaluate.load` by scikit-learn: the value of the hub's `accuracy`."""

from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score


class Accuracy(evaluate.Metric):  # type: ignore[misc]
    """Share of the predictions that equal their references."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("int32")
        return evaluate.MetricInfo(
            description="Share of the predictions that equal their references.",
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(
        self, predictions: Any, references: Any, normalize: bool = True, sample_weight: Any = None
    ) -> dict[str, float]:
        score = accuracy_score(references, predictions, normalize=normalize, sample_weight=sample_weight)
        return {"accuracy": float(score)}
