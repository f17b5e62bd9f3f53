"""GLUE's metrics for `evaluate.load(path, task)` by scikit-learn and scipy: the values of the hub's `glue`."""

from typing import Any

import datasets
import evaluate
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef


REGRESSION = "stsb"
MATTHEWS = "cola"
WITH_F1 = ("mrpc", "qqp")
PLAIN = ("mnli", "mnli_matched", "mnli_mismatched", "qnli", "rte", "sst2", "wnli", "hans")

DESCRIPTION = "Accuracy, F1, Matthews, Pearson and Spearman correlation, as GLUE (arXiv 1804.07461) has them."


class Glue(evaluate.Metric):  # type: ignore[misc]
    """Metrics of one task; the task is the configuration's name."""

    def _info(self) -> evaluate.MetricInfo:
        valid = (REGRESSION, MATTHEWS, *WITH_F1, *PLAIN)
        if self.config_name not in valid:
            raise KeyError(f"unknown task {self.config_name!r}; valid are {', '.join(valid)}")
        value = datasets.Value("float32" if self.config_name == REGRESSION else "int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": value, "references": value}),
            format="numpy",
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        if self.config_name == REGRESSION:
            correlations = {"pearson": pearsonr(predictions, references)[0]}
            correlations["spearmanr"] = spearmanr(predictions, references)[0]
            return {name: float(value) for name, value in correlations.items()}
        if self.config_name == MATTHEWS:
            return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
        accuracy = {"accuracy": float((predictions == references).mean())}
        if self.config_name in WITH_F1:
            return accuracy | {"f1": float(f1_score(y_true=references, y_pred=predictions))}
        return accuracy
