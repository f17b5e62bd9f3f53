"""Scripts with the arguments and the flow of transformers' run_clm.py and run_glue.py, under every published name.

The scripts in `scripts/` know nothing of hf_lowrank; their data are local files and their metrics the packaged ones.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
import torch
from safetensors.torch import load_file
from streams import COVERING
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import hf_lowrank
from hf_lowrank.hf import local_metrics
from hf_lowrank.methods import resolve


SCRIPTS = Path(__file__).parent / "scripts"
CLM, GLUE = SCRIPTS / "language_modeling.py", SCRIPTS / "text_classification.py"
WORDS = ["good", "bad", "fine", "poor", "a", "film", "book", "and", "long", "short"]
OVERRIDES = (
    "vocab_size=64,hidden_size=16,intermediate_size=24,num_hidden_layers=1,num_attention_heads=2,"
    "num_key_value_heads=2,max_position_embeddings=32"
)
OTHERS = [name for name in resolve.names() if name not in hf_lowrank.METHODS]


def sentences(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(0, len(WORDS), (rows, 8), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row) for row in picked]


def write(folder, name, rows):
    """Write rows as NAME.txt (their first column), NAME.csv and NAME.json (one object a line)."""
    columns = list(rows[0])
    (folder / f"{name}.txt").write_text("".join(f"{row[columns[0]]}\n" for row in rows))
    lines = [",".join(columns), *(",".join(map(str, row.values())) for row in rows)]
    (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """A folder with texts, labelled sentences and pairs, a tokenizer and a tiny random encoder."""
    folder = tmp_path_factory.mktemp("upstream")
    for split, seed in (("train", 0), ("validation", 1)):
        texts = sentences(32, seed)
        write(folder, f"text_{split}", [{"text": text} for text in texts])
        labelled = [{"sentence": text, "label": int("good" in text)} for text in texts]
        write(folder, f"single_{split}", labelled)
        pairs = [
            {"sentence1": a, "sentence2": b, "label": len(a) / 8} for a, b in zip(texts, texts[::-1], strict=True)
        ]
        write(folder, f"pair_{split}", pairs)
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    tokenizer.train_from_iterator(WORDS, trainers.WordLevelTrainer(special_tokens=list(special.values())))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special)
    fast.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = BertConfig(vocab_size=64, hidden_size=16, intermediate_size=24, pad_token_id=fast.pad_token_id, **sizes)
    BertModel(config).save_pretrained(folder / "encoder")
    fast.save_pretrained(folder / "encoder")
    return folder


def line(script, local, out, optim, *more, data=None, kind=None):
    """The command line of a script, as a user would write it."""
    data, kind = (data or "text", kind or "txt") if script == CLM else (data or "single", kind or "csv")
    words = ["--train_file", local / f"{data}_train.{kind}", "--validation_file", local / f"{data}_validation.{kind}"]
    if script == CLM:
        words += ["--model_type", "llama", "--config_overrides", OVERRIDES, "--tokenizer_name", local / "tokenizer"]
        words += ["--block_size", 16]
    else:
        words += ["--model_name_or_path", local / "encoder", "--max_seq_length", 16]
    words += ["--optim", optim, "--optim_args", options(optim), "--cache_dir", local / "cache", "--output_dir", out]
    fixed = "--do_train --do_eval --max_steps 3 --per_device_train_batch_size 4 --learning_rate 1e-2 --use_cpu True "
    fixed += "--report_to none --save_strategy no --disable_tqdm True --logging_steps 1 --max_grad_norm 0"
    return [*map(str, words), *fixed.split(), *map(str, more)]


def options(optim):
    """A rank and an interval that suit a tiny model, where the method has them."""
    small = {"rank": 0.25, "update_proj_gap": 2}  # GWT takes powers of two only
    known = resolve.complete(optim, {})
    return ",".join(f"{key}={value}" for key, value in small.items() if key in known)


@pytest.fixture
def run(local, tmp_path, monkeypatch):
    """Run a script in this process, as the launcher does: register, packaged metrics, main()."""
    monkeypatch.setattr(evaluate, "load", evaluate.load)  # put back at the end
    local_metrics.install()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def run(script, optim, *more, **kwargs):
        spec = importlib.util.spec_from_file_location(script.stem, script)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, script.stem, module)  # dataclasses look for their module there
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [str(script), *line(script, local, tmp_path / "out", optim, *more, **kwargs)])
        module.main()
        return json.loads((tmp_path / "out" / "all_results.json").read_text())

    return run


def check(out, optim, results, metric):
    settings = json.loads((out / "hf_lowrank.json").read_text())
    assert optim in json.dumps(settings)
    assert math.isfinite(results["train_loss"]) and math.isfinite(results["eval_loss"])
    assert 0 <= results[metric] <= 1
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in history if "loss" in entry]) == 3
    assert all(torch.isfinite(weight).all() for weight in load_file(out / "model.safetensors").values())


ROWS = [  # those with a part that no other has; the others, whose parts go through Trainer here too, in the long tier
    pytest.param(name, marks=() if name in COVERING else pytest.mark.full) for name in hf_lowrank.METHODS
]


@pytest.mark.parametrize("optim", ROWS)
def test_language_modeling(run, tmp_path, optim):
    check(tmp_path / "out", optim, run(CLM, optim), "eval_accuracy")


@pytest.mark.parametrize("optim", ROWS)
def test_text_classification(run, tmp_path, optim):
    check(tmp_path / "out", optim, run(GLUE, optim), "eval_accuracy")


@pytest.mark.full
@pytest.mark.parametrize("script", [CLM, GLUE], ids=["clm", "glue"])
@pytest.mark.parametrize("optim", OTHERS)
def test_every_ending(run, tmp_path, script, optim):
    check(tmp_path / "out", optim, run(script, optim), "eval_accuracy")


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_other_files_of_text_give_the_same_training(run, tmp_path, kind):
    expected = run(CLM, "galore_i3s_adamw", kind="txt")
    found = run(CLM, "galore_i3s_adamw", kind=kind)
    assert found["train_loss"] == expected["train_loss"] and found["eval_loss"] == expected["eval_loss"]


@pytest.mark.parametrize(
    ("data", "task", "names"),
    [
        ("single", "cola", ["matthews_correlation"]),
        ("single", "mrpc", ["accuracy", "f1"]),
        ("pair", "stsb", ["pearson", "spearmanr"]),
        ("pair", None, ["mse"]),
    ],
)
def test_the_metrics_of_the_tasks(run, data, task, names):
    more = ["--task_name", task] if task else []
    results = run(GLUE, "fira_i3s_adamw", "--pad_to_max_length", "False", *more, data=data, kind="json")
    assert all(f"eval_{name}" in results for name in names)


@pytest.mark.parametrize("optim", ["galore_i3s_adamw_8bit", "galore_i3s_adamw_layerwise"])
def test_resumed_equals_uninterrupted(run, tmp_path, optim):
    whole = run(CLM, optim, "--save_strategy", "steps", "--save_steps", 2)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    checkpoint = tmp_path / "out" / "checkpoint-2"
    resumed = run(CLM, optim, "--resume_from_checkpoint", checkpoint)
    assert resumed["eval_loss"] == whole["eval_loss"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.processes
@pytest.mark.parametrize("script", [CLM, GLUE], ids=["clm", "glue"])
def test_under_the_launcher(local, tmp_path, script):
    command = [sys.executable, "-m", "hf_lowrank", "--local-metrics", str(script)]
    command += line(script, local, tmp_path / "out", "galore_i3s_adamw")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    check(tmp_path / "out", "galore_i3s_adamw", results, "eval_accuracy")
