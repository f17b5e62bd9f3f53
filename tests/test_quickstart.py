"""The quickstart on a tiny model: what it leaves, reruns, resuming, two rates, errors."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import EvalPrediction, TrainingArguments

import hf_lowrank


RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart"
TINY = shlex.split(
    "--hidden_size 32 --intermediate_size 48 --num_hidden_layers 1 --num_attention_heads 2 --vocab_size 300 "
    "--block_size 16 --eval_blocks 4 --use_cpu True"
)
LOW_RANK = ["--optim_args", "rank=8,update_proj_gap=2,scale=0.25"]


@pytest.fixture
def recipe(monkeypatch):
    """The folder of the recipe on the path, as it is for its scripts."""
    hf_lowrank.register()
    monkeypatch.syspath_prepend(str(RECIPE))
    import run_clm

    return run_clm


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    source = (RECIPE / "run_clm.py").read_text()
    (folder / "train.txt").write_text(source)
    (folder / "validation.txt").write_text(source[3000:6000])
    return ["--train_file", str(folder / "train.txt"), "--validation_file", str(folder / "validation.txt")]


def run(recipe, monkeypatch, *options):
    fixed = ["--report_to", "none", "--disable_tqdm", "True", "--learning_rate", "1e-2", "--save_steps", "2"]
    monkeypatch.setattr(sys, "argv", ["run_clm.py", *TINY, *LOW_RANK, *fixed, *map(str, options)])
    recipe.main()


@pytest.mark.processes
def test_it_compares_all_and_leaves_the_folder(tmp_path, texts):
    folder = tmp_path / "run"
    options = ["--max_steps", "41", "--logging_steps", "10", "--eval_steps", "20", "--save_steps", "20"]
    line = [sys.executable, str(RECIPE / "quickstart.py"), "--output_dir", str(folder), *TINY, *texts, *options]
    done = subprocess.run(line, capture_output=True, text=True, cwd=RECIPE.parents[1])
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "results.json").read_text())["runs"]
    assert all(f"| {name} " in done.stdout for name in results)
    most = results.pop("adamw_torch_fused")["optimizer_state_mib"]
    assert len(results) == 2 and all(run["optimizer_state_mib"] < most for run in results.values())
    assert all(1 < run["heldout_perplexity"] < 1000 and run["tokens_per_second"] > 0 for run in results.values())
    for name in ("adamw_torch_fused", *results):
        assert (folder / name / "checkpoint-41" / "optimizer.pt").exists()
        assert (folder / name / "trainer_state.json").exists()
    refreshes = (folder / "galore_i3s_adamw" / "hf_lowrank_refreshes.jsonl").read_text().splitlines()
    assert len(refreshes) == 2 * 7  # at steps 1 and 41; seven matrices
    for picture in ("loss.png", "subspace_overlap.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_a_killed_run_is_replaced_and_other_folders_are_refused(recipe, tmp_path, capsys):
    import quickstart

    left = tmp_path / "run" / "galore_i3s_adamw" / "checkpoint-2"
    quickstart.prepare(tmp_path / "run")
    left.mkdir(parents=True)
    (left / "optimizer.pt").write_text("half a fi")
    quickstart.prepare(tmp_path / "run")
    assert not left.exists()
    with pytest.raises(SystemExit) as ended:
        quickstart.prepare(tmp_path)
    assert ended.value.code == 2 and "did not write" in capsys.readouterr().err


def test_options_of_one_optimizer_are_refused_before_anything_is_trained(recipe, tmp_path, monkeypatch, capsys):
    import quickstart

    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output_dir", str(tmp_path / "run"), *LOW_RANK])
    with pytest.raises(SystemExit) as ended:
        quickstart.main()
    assert ended.value.code == 2 and "--optim_args is the trainings' own" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max_stpes", "10"], "--max_stpes"),
        (["--train_file", "nowhere.txt", "--validation_file", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--grid", "nowhere.json"], "--grid nowhere.json is no file that grid.py has written"),
        (["--num_hidden_layers", "0"], "--num_hidden_layers must be at least 1, not 0"),
        (["--block_size", "99999"], "fewer than 99999 tokens"),
        (["--learning_rate", "-1"], "--learning_rate must be at least 0, not -1"),
        (["--matrix_lr_scale", "0.5"], "--matrix_lr_scale is the trainings' own here"),
        (["--resume_from_checkpoint", "true"], "--resume_from_checkpoint is the trainings' own here"),
        (["--grid", "text.json"], "--grid text.json is no file that grid.py has written"),
    ],
)
def test_a_mistake_leaves_the_last_results(recipe, texts, tmp_path, monkeypatch, capsys, options, sentence):
    import quickstart

    quickstart.prepare(tmp_path / "run")
    (tmp_path / "run" / "results.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text(json.dumps({"runs": [{"optimizer": "muon_4bit", "perplexity": 3.0}]}))
    given = [*texts, *options] if "--train_file" not in options else options
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--output_dir", str(tmp_path / "run"), *given])
    with pytest.raises(SystemExit) as ended:
        quickstart.main()
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert (tmp_path / "run" / "results.json").exists()


def test_rates_are_those_of_the_grid_that_is_named(recipe, tmp_path):
    import quickstart

    key = {"learning_rate": 0.5, "scale": 0.25}
    runs = [{"optimizer": name, "seed": 1, "perplexity": 9.0, **key} for name in quickstart.OPTIMIZERS]
    runs += [{**run, "perplexity": None, "scale": 1.0} for run in runs]
    (tmp_path / "grid.json").write_text(json.dumps({"runs": runs}))
    assert quickstart.rates(tmp_path / "grid.json") == dict.fromkeys(quickstart.OPTIMIZERS, key)


@pytest.mark.parametrize("optim", ["galore_i3s_adamw", "adamw_torch"])
def test_resumed_equals_uninterrupted(recipe, monkeypatch, tmp_path, texts, optim):
    options = ["--optim", optim, "--do_train", "--max_steps", 4, "--output_dir", tmp_path, *texts]
    options += [] if "galore" in optim else ["--matrix_lr_scale", 0.5]
    run(recipe, monkeypatch, *options)
    whole = load_file(tmp_path / "model.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-4")
    run(recipe, monkeypatch, *options, "--resume_from_checkpoint", "true")
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_two_rates_reach_the_matrices_that_would_be_projected(recipe, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    args = TrainingArguments(str(tmp_path), optim="adamw_torch", learning_rate=1e-2, weight_decay=0.1, use_cpu=True)
    cls, kwargs = recipe.two_rates(model, args, 0.25)
    rates = {name: g["lr"] for g in kwargs["params"] for name in g["param_names"]}
    assert set(rates) == {name for name, _ in model.named_parameters()}
    assert {name for name, rate in rates.items() if rate == 0.25e-2} == {n for n in rates if n.endswith("proj.weight")}
    assert cls is torch.optim.AdamW and set(rates.values()) == {1e-2, 0.25e-2}


def test_perplexity_weights_every_token_the_same(recipe):
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(1))
    labels[0, 2:] = -100  # a short block
    sums = recipe.negative_log_likelihood(logits, labels)
    log_p = torch.log_softmax(logits, -1)
    taken = [log_p[b, t, labels[b, t + 1]].item() for b in range(3) for t in range(4) if labels[b, t + 1] >= 0]
    found = recipe.perplexity(EvalPrediction(predictions=sums.numpy(), label_ids=labels.numpy()))
    assert found["perplexity"] == pytest.approx(np.exp(-np.mean(taken)), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--train_file", "nowhere.txt", "--validation_file", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--train_file", "TEXT"], "--train_file and --validation_file go together"),
        (["--train_file", "TEXT", "--validation_file", "TEXT", "--block_size", 99999], "fewer than 99999 tokens"),
        (["--resume_from_checkpoint", "true"], "no checkpoint to resume from"),
        (["--foo", 1], "--foo"),
        (["--num_attention_heads", 0], "--num_attention_heads must be at least 1, not 0"),
        (["--num_attention_heads", 3], "even multiple of --num_attention_heads"),
        (["--block_size", 1], "--block_size must be at least 2, not 1"),
        (["--vocab_size", 256], "--vocab_size must be at least 257, not 256"),
        (["--eval_blocks", 0], "--eval_blocks must be at least 1, not 0"),
        (
            [
                "--train_file",
                "TEXT",
                "--validation_file",
                "TEXT",
                "--optim",
                "sgd",
                "--optim_args",
                "",
                "--matrix_lr_scale",
                1,
            ],
            "for --optim sgd leave it out",
        ),
        (["--train_file", "TEXT", "--validation_file", "TEXT", "--matrix_lr_scale", 0.5], "set scale="),
    ],
)
def test_errors_are_one_sentence(recipe, monkeypatch, tmp_path, texts, capsys, options, sentence):
    options = [texts[1] if option == "TEXT" else option for option in options]
    with pytest.raises(SystemExit) as ended:
        run(recipe, monkeypatch, "--optim", "galore_i3s_adamw", "--do_train", "--output_dir", tmp_path, *options)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run_clm.py: ")]
    assert len(lines) == 1 and sentence in lines[0]
