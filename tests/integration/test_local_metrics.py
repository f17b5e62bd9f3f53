"""The packaged metrics, through `evaluate.load` as scripts call it, against their formulas."""

import importlib.util
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest

from hf_lowrank import __main__ as launcher
from hf_lowrank.hf import local_metrics


@pytest.fixture
def load(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(evaluate, "load", evaluate.load)  # put back at the end
    local_metrics.install()
    return evaluate.load


def test_accuracy_and_squared_error(load):
    draw = np.random.default_rng(0)
    labels, found = draw.integers(0, 3, (2, 100))
    accuracy = load("accuracy").compute(predictions=found, references=labels)
    assert accuracy == {"accuracy": pytest.approx(np.mean(found == labels))}
    counted = load("accuracy").compute(predictions=found, references=labels, normalize=False)
    assert counted == {"accuracy": np.sum(found == labels)}
    x, y = draw.normal(size=(2, 100))
    error = load("mse").compute(predictions=x, references=y)
    assert error == {"mse": pytest.approx(np.mean((x - y) ** 2), rel=1e-5)}  # evaluate stores fp32


def test_the_tasks_of_glue(load):
    labels, found = np.random.default_rng(1).integers(0, 2, (2, 100))
    both = load("glue", "mrpc").compute(predictions=found, references=labels)
    hits = np.sum(found & labels)
    f1 = 2 * hits / (found.sum() + labels.sum())
    assert both == pytest.approx({"accuracy": np.mean(found == labels), "f1": f1})
    matthews = load("glue", config_name="cola").compute(predictions=found, references=labels)
    # for two classes Matthews' is Pearson's
    assert matthews == {"matthews_correlation": pytest.approx(np.corrcoef(found, labels)[0, 1])}
    with pytest.raises(KeyError, match="unknown task 'sst3'; valid are stsb, cola"):
        load("glue", "sst3")


def test_other_metrics_are_left_to_evaluate_and_twice_is_once(load, tmp_path):
    local_metrics.install()
    assert evaluate.load is load
    own = tmp_path / "own.py"
    own.write_text(Path(local_metrics.path("mse")).read_text())
    assert load(str(own)).compute(predictions=[1.0], references=[3.0]) == {"mse": 4.0}


def test_what_is_missing_is_named(monkeypatch, capsys):
    real = importlib.util.find_spec

    def without(*absent):
        return lambda name, *rest: None if name in absent else real(name, *rest)

    monkeypatch.setattr(local_metrics, "find_spec", without("sklearn", "scipy"))
    monkeypatch.setattr(sys, "argv", ["hf_lowrank", "--local-metrics", __file__])
    with pytest.raises(SystemExit) as ended:
        launcher.main()
    assert ended.value.code == 2
    sentence = "python -m hf_lowrank: the local metrics need packages that are not installed: pip install "
    assert capsys.readouterr().err == sentence + "scikit-learn scipy\n"
