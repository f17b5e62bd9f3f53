"""The GLUE recipe on a tiny random RoBERTa and generated files: trainings, comparisons, mistakes."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    Trainer,
    TrainingArguments,
)

import hf_lowrank
from recipes.glue import run
from recipes.glue.settings import row_settings
from recipes.glue.training import GlueArguments, set_warmup
from recipes.shared.baselines import BaselineArguments


RECIPE = Path(__file__).parents[2] / "recipes" / "glue"


WORDS = ["good", "bad", "the", "a", "film", "plot", "cat", "dog", "runs", "sleeps", "well", "badly", "and", "not"]


COLUMNS = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mnli": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"],
    **dict.fromkeys(["stsb", "mrpc", "rte"], ["sentence1", "sentence2"]),
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random RoBERTa with a tokenizer of words."""
    folder = tmp_path_factory.mktemp("encoder")
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **names).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    RobertaModel(
        RobertaConfig(vocab_size=18, max_position_embeddings=34, initializer_range=0.2, **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All eight tasks: the label says whether the first text has the word good; STS-B's is 0 or 5 for the same."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for task, columns in COLUMNS.items():
        (folder / task).mkdir()
        for split, rows in {"train": 96, "validation": 32}.items():
            lines = [[*columns, "label"]]
            for i in range(rows):
                texts = [" ".join(draw.choice(WORDS[2:], 5)) for _ in columns]
                texts[0] = f"{WORDS[i % 2]} {texts[0]}"
                lines.append([*texts, 5.0 * (i % 2 == 0) if task == "stsb" else int(i % 2 == 0)])
            tabs = task == "qnli"
            text = "\n".join(("\t" if tabs else ",").join(map(str, line)) for line in lines)
            (folder / task / f"{split}.{'tsv' if tabs else 'csv'}").write_text(text + "\n")
    return folder


def command(*words):
    """Run the recipe's command line."""
    run.main([str(word) for word in words])


def small(encoder, data, output_dir, *more):
    """Options that make a training small."""
    there = ["--model_name_or_path", encoder, "--data_dir", data, "--output_dir", output_dir, "--use_cpu", "True"]
    return [*there, "--report_to", "none", "--disable_tqdm", "True", "--dataloader_pin_memory", "False", *more]


@pytest.mark.parametrize(("task", "metric"), [("rte", "accuracy"), ("stsb", "pearson")])
@pytest.mark.parametrize("optim", ["galore_i3s_adamw", "adamw_torch"])
def test_a_training_learns_the_task_and_leaves_its_results(encoder, data, tmp_path, optim, task, metric, capsys):
    options = ["--optim", optim, "--learning_rate", "1e-2", "--max_steps", "60", "--save_strategy", "no"]
    if "i3s" in optim:
        options += ["--optim_args", "rank=8,update_proj_gap=10,scale=1"]
    command(RECIPE / f"configs/full/{task}.yaml", *small(encoder, data, tmp_path / "run", *options))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["metrics"]["validation"][metric] > 0.9  # a word decides; guessing gives 0.5 and 0
    assert result["steps"] == 60 and result["train_seconds"] > 0
    assert result["weights_mib"] * (2 if optim == "adamw_torch" else 1.9) >= result["state_mib"] - 1e-2 > 0
    assert metric in capsys.readouterr().out


@pytest.mark.parametrize("task", ["stsb", "rte"])
def test_the_loss_of_a_step_is_the_mean_over_its_rows_however_it_is_cut(encoder, data, tmp_path, task):
    losses = []
    for name, batch, cuts in (("whole", 32, 1), ("cut", 8, 4)):
        sizes = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps", cuts]
        options = ["--learning_rate", "0", "--max_steps", "3", "--save_strategy", "no", *sizes]
        command(RECIPE / f"configs/full/{task}.yaml", *small(encoder, data, tmp_path / name, *options))
        losses.append(json.loads((tmp_path / name / "result.json").read_text())["train_loss"])
    # All 96 rows of the untrained model: dropout and rounding to four digits differ. A sum would be 4 x as much.
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_lora_trains_the_adapters_and_the_head_alone(encoder, data, tmp_path):
    config = RECIPE / "configs/lora_r4/cola.yaml"
    command(config, *small(encoder, data, tmp_path, "--max_steps", "2", "--save_strategy", "steps"))
    result = json.loads((tmp_path / "result.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)  # merged: an ordinary one
    head = sum(p.numel() for p in model.classifier.parameters())
    trained = 2 * 2 * 4 * 32 + head  # A and B of query and value, rank 4
    assert result["state_mib"] == pytest.approx(2 * 4 * trained / 2**20, abs=0.005)  # rounded to 0.01
    before = AutoModelForSequenceClassification.from_pretrained(encoder).state_dict()
    same = {name for name, p in model.state_dict().items() if torch.equal(p, before[name])}
    assert not any(re.search("query.weight|value.weight|classifier", name) for name in same)
    assert {name for name in before if not re.search("query.weight|value.weight|classifier", name)} <= same


@pytest.mark.parametrize("row", ["qlora_r64", "mezo:lozo", "lora_r4:cola"])
def test_a_baseline_trains_from_its_settings_and_leaves_an_ordinary_model(encoder, data, tmp_path, row):
    options = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "4", "--learning_rate", "1e-2"]
    folder = tmp_path / "run"
    command(*row_settings(row, "cola"), *small(encoder, data, folder, *options))
    result = json.loads((folder / "result.json").read_text())
    assert result["steps"] == 4 and (result["state_mib"] == 0) == (row == "mezo:lozo")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    before = AutoModelForSequenceClassification.from_pretrained(encoder).state_dict()
    assert model.state_dict().keys() == before.keys() and {p.dtype for p in model.parameters()} == {torch.float32}
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    change = (model.get_parameter(name) - before[name]).norm() / before[name].norm()
    assert 1e-4 < change < 0.5


def test_a_comparison_prints_the_tables_and_goes_on_where_it_stopped(encoder, data, tmp_path, capsys):
    words = ["--task", "all", "--rows", "galore_r4:galore_i3s_adamw"]
    words += small(encoder, data, tmp_path, "--max_steps", "1", "--eval_strategy", "no")
    command(*words)
    first = capsys.readouterr().out
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert len(lines) == 8
    (tmp_path / "results.jsonl").write_text("\n".join(lines[1:]) + "\n")
    command(*words)
    again = capsys.readouterr().out
    assert "[1 of 1] galore_r4:galore_i3s_adamw, cola, seed 1234" in again and again.count("seed 1234: {") == 1
    scores = [re.sub(r"\s+", " ", text.split("Seconds of")[0]) for text in (first, again)]
    assert scores[0].split("Scores in", 1)[1] == scores[1].split("Scores in", 1)[1]  # the same seed, the same scores
    table = (tmp_path / "tables.md").read_text()
    assert "(r=4)" not in table  # the papers' rows belong to RoBERTa-base
    ours = next(line for line in table.splitlines() if line.startswith("| galore_r4"))
    cells = [cell.strip() for cell in ours.strip("|").split("|")]
    assert len(cells) == 11 and cells[1].endswith("M") and "-" not in cells[2:]


def test_every_file_of_settings_is_read_by_transformers_and_by_its_optimizer(encoder):
    model = AutoModelForSequenceClassification.from_pretrained(encoder)
    files = sorted((RECIPE / "configs").rglob("*.yaml"))
    assert len(files) == 8 * 10
    for file in files:
        name = yaml.safe_load(file.read_text())["optim"]
        parser = HfArgumentParser((GlueArguments, BaselineArguments, TrainingArguments))
        glue, _, args = parser.parse_yaml_file(str(file))
        assert (glue.task, args.optim) == (file.stem, name)
        if name in hf_lowrank.METHODS:
            _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
            projected = [p for group in kwargs["params"] if "rank" in group for p in group["params"]]
            assert (
                len(projected) == 6
            )  # query, key, value, two of the attention's and the layer's output, intermediate
        assert args.output_dir == f"runs/glue/{file.parent.name}/{file.stem}"


def test_the_warm_up_is_a_share_on_every_line_of_transformers(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    set_warmup(0.06, args)
    assert args.get_warmup_steps(1000) == 60
    args = TrainingArguments(str(tmp_path), use_cpu=True, warmup_steps=5)
    set_warmup(0.06, args)
    assert args.get_warmup_steps(1000) == 5


def test_half_a_file_of_weights_is_told_in_one_sentence(encoder, data, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(encoder, broken)
    weights = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert_refused(
        capsys, "cannot load the model", ["--task", "rte", *small(broken, data, tmp_path / "run")], tmp_path / "run"
    )


GOOD = "sentence,label\na good film,1\na bad film,0\n"


@pytest.mark.parametrize(
    ("training", "sentence"),
    [
        ("", "train.csv is empty"),
        ("sentence,label\n", "train.csv has no rows below its header"),
        ("text,label\na good film,1\n", "train.csv lacks the column sentence; it has text, label"),
        ("sentence\na good film\n", "train.csv lacks the column label; it has sentence"),
        ("sentence,label\na film, it is,1\n", "rows of more fields than its header has columns"),
        ("sentence,label\na film,2\n", "the label of row 1 is '2'; SST-2 wants one of 0, 1"),
        ("sentence,label\na film,1\na film,yes\n", "the label of row 2 is 'yes'; SST-2 wants one of 0, 1"),
        (None, "has no train.csv or train.tsv"),
    ],
)
def test_wrong_files_are_told_in_one_sentence(encoder, tmp_path, capsys, training, sentence):
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    (tmp_path / "data" / "sst2" / "validation.csv").write_text(GOOD)
    if training is not None:
        (tmp_path / "data" / "sst2" / "train.csv").write_text(training)
    options = small(encoder, tmp_path / "data", tmp_path / "run")
    assert_refused(capsys, sentence, ["--task", "sst2", *options], tmp_path / "run")
    assert_refused(capsys, sentence, ["--task", "sst2", "--rows", "full", "galore_r4", *options], tmp_path / "run")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--task", "sst3"], "unknown task 'sst3'; valid are cola, stsb, mrpc, rte, sst2, mnli, qnli, qqp, and all"),
        (["--task", "cola", "sst3"], "unknown task 'sst3'"),
        (["--task", "wnli", "--rows", "full"], "unknown task 'wnli'"),
        (["--task", "all", "--rows", "galore_r5"], "rows are full, galore_r4"),
        (["--task", "cola", "--optim", "galore_i3s_adamw", "--optim_args", "rnak=8"], "rank"),
        (
            ["--task", "cola", "--optim", "galore_i3s_adamw", "--optim_target_modules", "q_proj"],
            "matches no trainable",
        ),
        (["--task", "cola", "--optim", "galore_i3s_adam"], "--optim galore_i3s_adam is no choice; galore_i3s_adamw"),
        (["--task", "cola", "--max_train_samples", "0"], "--max_train_samples must be at least 1, not 0"),
        (["--task", "cola", "--max_seq_length", "2"], "--max_seq_length must be at least 3, not 2"),
        (["--task", "cola", "--warmup_share", "1.5"], "--warmup_share must be at least 0 and below 1, not 1.5"),
        (["--task", "cola", "--model_name_or_path", "nobody/nothing"], "cannot load the model 'nobody/nothing'"),
        (["--task", "cola", "--resume_from_checkpoint", "true"], "there is no checkpoint to resume from in"),
        (["--task", "cola", "--baseline", "sltrain"], "--baseline sltrain is for pretraining alone; adamw"),
        (["--task", "cola", "--baseline", "mezo"], "--max_grad_norm 1 would clip nothing"),
        (["--task", "cola", "--baseline", "adamw_4bit"], "torchao"),
        (["missing.yaml"], "cannot read the settings missing.yaml"),
        (["--task", "cola", "--baseline", "lora", "--adapter_targets", "q_proj"], "matches no trainable"),
    ],
)
def test_wrong_options_are_told_in_one_sentence(encoder, data, tmp_path, capsys, monkeypatch, more, sentence):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_refused(capsys, sentence, [*small(encoder, data, tmp_path / "run"), *more], tmp_path / "run")


def test_without_a_network_the_hub_is_told_in_one_sentence(encoder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = ["--model_name_or_path", encoder, "--output_dir", tmp_path / "run", "--task", "cola"]
    assert_refused(capsys, "give local files with --data_dir", options, tmp_path / "run")


def assert_refused(capsys, sentence, words, folder):
    with pytest.raises(SystemExit) as ended:
        command(*words)
    name = Path(sys.argv[0]).name
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{name}: ")]
    assert ended.value.code == 2 and len(told) == 1 and sentence in told[0]
    assert not folder.exists()


def test_a_row_with_a_rule_of_layer_sampling_keeps_the_options_of_its_optimizer():
    plain, sampled = row_settings("galore_r8", "cola"), row_settings("galore_r8:owlore", "cola")
    given = plain[plain.index("--optim_args") + 1]
    assert sampled == [*plain, "--optim_args", f"{given},layer_sampling=owlore"]
    assert row_settings("full:badam", "cola")[-2:] == ["--optim_args", "layer_sampling=badam"]
