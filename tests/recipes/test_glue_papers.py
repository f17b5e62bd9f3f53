"""The GLUE recipe's metrics, settings and tables beside the papers'."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from recipes.glue import papers
from recipes.glue.settings import row_settings, settings
from recipes.glue.tables import tables
from recipes.glue.tasks import TASKS
from recipes.glue.training import load_metric


RECIPE = Path(__file__).parents[2] / "recipes" / "glue"


ORDER = ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]


def test_the_papers_rows_stand_beside_ours():
    def run(task, value):
        metrics = dict(zip(TASKS[task].metrics, (value, value - 0.1), strict=False))
        sizes = {"weights_mib": 400.0, "state_mib": 50.0, "train_seconds": 100 * value}
        return {"metrics": {"validation": metrics}, **sizes}

    runs = {
        "ours": {task: [run(task, 0.80), run(task, 0.82)] for task in TASKS},
        "unfinished": {"cola": [run("cola", 0.6)]},
    }
    text = tables(runs, model="FacebookAI/roberta-base", note="the note")
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.setdefault(cells[0], []).append(cells[1:])
    galore, f1, seconds = rows["ours"]
    spread = "81.00 ± 1.41"
    assert galore[:4] == ["450M", spread, f"{spread} (71.00 ± 1.41)", f"{spread} (71.00 ± 1.41)"]
    assert galore[8] == f"{spread} (71.00 ± 1.41)" and galore[9] == "81.00"  # QQP: accuracy (F1)
    assert f1[7] == f"71.00 ± 1.41 ({spread})" and f1[8] == "79.75"  # QQP: F1 (accuracy), and in the average
    assert seconds[0] == "81.0 ± 1.4" and seconds[8] == "81.0"
    assert rows["unfinished"][0] == ["450M", "60.00", *["-"] * 8]
    assert rows["GaLore (r=4), GaLore's paper"][0][:2] == ["253M", "60.35"]
    assert rows["SubTrack (r=8), SubTrack's paper"][0][7:] == ["87.57", "84.85"]
    assert text.rstrip().endswith("the note")


def test_the_papers_averages_follow_from_their_columns():
    # Printed to two digits; LoRA at rank 4 and full fine-tuning are printed 0.01 off the mean of their columns.
    for row in papers.GALORE.values():
        assert np.mean(row[1:9]) == pytest.approx(row[9], abs=0.011)
    averages = [np.mean(row).round(2) for row in papers.SUBTRACK.values()]
    assert averages == pytest.approx([85.19, 85.37, 84.67, 84.85], abs=0.011)


def test_metrics_are_those_of_the_formulas():
    draw = np.random.default_rng(1)
    y, p = draw.integers(0, 2, (2, 200))
    tp, tn, fp, fn = (np.sum((p == a) & (y == b)) for a, b in ((1, 1), (0, 0), (1, 0), (0, 1)))
    found = load_metric("mrpc", local=True).compute(predictions=p, references=y)
    assert found == pytest.approx({"accuracy": (tp + tn) / 200, "f1": 2 * tp / (2 * tp + fp + fn)})
    assert load_metric("qqp", local=True).compute(predictions=p, references=y) == found
    matthews = (tp * tn - fp * fn) / np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    found = load_metric("cola", local=True).compute(predictions=p, references=y)
    assert found == pytest.approx({"matthews_correlation": matthews})

    x = draw.normal(size=200).astype(np.float32)
    z = (x**3 + draw.normal(size=200)).astype(np.float32)

    def correlation(a, b):
        a, b = a - a.mean(), b - b.mean()
        return a @ b / np.sqrt((a @ a) * (b @ b))

    ranks = [values.argsort().argsort().astype(float) for values in (x, z)]
    expected = {"pearson": correlation(x, z), "spearmanr": correlation(*ranks)}
    found = load_metric("stsb", local=True).compute(predictions=x, references=z)
    assert found == pytest.approx(expected, rel=1e-5)  # the values are stored in fp32
    three = draw.integers(0, 3, (2, 50))
    found = load_metric("mnli", local=True).compute(predictions=three[0], references=three[1])
    assert found == {"accuracy": pytest.approx(np.mean(three[0] == three[1]))}


LEARNING_RATES = {
    4: [1e-5, 1e-5, 3e-5, 3e-5, 1e-5, 1e-5, 1e-5, 1e-5],
    8: [1e-5, 2e-5, 2e-5, 1e-5, 1e-5, 2e-5, 2e-5, 3e-5],
}


STEP_SIZES = {4: [0.001, 0.001, 1.5, 0.1, 0.0001, 0.001, 1, 1], 8: [0.001, 0.01, 15, 3, 0.001, 0.001, 1, 1]}


SCALES = {4: 4, 8: 2}


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("paper", ["galore", "subtrack"])
def test_settings_are_those_of_the_papers(paper, rank):
    for i, task in enumerate(ORDER):
        file = RECIPE / "configs" / f"{paper}_r{rank}" / f"{task}.yaml"
        found = yaml.safe_load(file.read_text())
        options = dict(item.split("=") for item in found["optim_args"].split(","))
        expected = {"rank": rank, "update_proj_gap": 500, "scale": SCALES[rank]}
        if paper == "subtrack":
            assert (options.pop("step"), options.pop("accumulate")) == ("raw", "true")  # its Algorithm 1
            expected["eta"] = STEP_SIZES[rank][i]
        assert {name: float(value) for name, value in options.items()} == expected
        assert found["optim"] == {"galore": "galore_dominant_adamw", "subtrack": "subtrack_adamw"}[paper]
        assert found["adam_epsilon"] == 1e-6  # the default of their released optimizers
        assert found["optim_target_modules"] == "query,key,value,intermediate.dense,output.dense"
        assert (found["task"], found["learning_rate"]) == (task, LEARNING_RATES[rank][i])
        assert found["per_device_train_batch_size"] == (32 if task == "cola" else 16)
        assert (found["num_train_epochs"], found["max_seq_length"]) == (30, 512)


def test_lora_has_the_settings_of_hu_et_al():
    rates = [5e-4, 5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 5e-4, 4e-4]
    batches, epochs = [16, 16, 16, 32, 32, 16, 32, 16], [30, 60, 30, 80, 25, 25, 80, 40]
    for rank in (4, 8):
        for task, *expected in zip(ORDER, rates, batches, epochs, strict=True):
            found = yaml.safe_load((RECIPE / "configs" / f"lora_r{rank}" / f"{task}.yaml").read_text())
            names = ("learning_rate", "per_device_train_batch_size", "num_train_epochs")
            assert [found[name] for name in names] == expected
            assert (found["adapter_rank"], found["adapter_alpha"], found["warmup_share"]) == (rank, 8, 0.06)
            assert found["adapter_targets"] == "query,value"


def test_a_row_may_have_another_optimizer_or_baseline():
    plain = settings(RECIPE / "configs/galore_r8/cola.yaml")
    assert row_settings("galore_r8", "cola") == plain
    assert row_settings("galore_r8:fira_adamw", "cola") == [*plain, "--optim", "fira_adamw"]
    assert row_settings("galore_r8:relora", "cola") == [*plain, "--baseline", "relora"]
    assert row_settings(str(RECIPE / "configs/galore_r8"), "cola") == plain
