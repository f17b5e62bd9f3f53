"""Mean squared error for `evaluate.load` by scikit-learn: the value of the hub's `mse`."""

from typing import Any

import datasets
import evaluate
from sklearn.metrics import mean_squared_error


class MeanSquaredError(evaluate.Metric):  # type: ignore[misc]
    """Mean of the squared differences of predictions and references."""

    def _info(self) -> evaluate.MetricInfo:
        value = datasets.Value("float")
        return evaluate.MetricInfo(
            description="Mean of the squared differences of predictions and references.",
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: Any, references: Any, sample_weight: Any = None) -> dict[str, float]:
        return {"mse": float(mean_squared_error(references, predictions, sample_weight=sample_weight))}
