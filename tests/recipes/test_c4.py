"""C4 pretraining, run: resumed runs, workers, several processes, bf16, baselines, errors."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from processes import torchrun
from safetensors.torch import load_file

from recipes.c4_pretraining import run
from recipes.c4_pretraining.stream import STREAM_FILE


TINY = [str(Path(__file__).parent / "tiny.yaml")]


I3S = ["--optim", "galore_i3s_adamw", "--optim_args", "rank=8,update_proj_gap=2"]


@pytest.fixture
def main(monkeypatch):
    """Run the recipe's command line in this process."""

    def call(*options):
        monkeypatch.setattr("sys.argv", ["run.py", *map(str, options)])
        run.main()

    yield call
    datasets.logging.set_verbosity_warning()


RELORA = ["--baseline", "relora", "--adapter_rank", "4", "--relora_every", "5", "--relora_warmup", "1"]


LORA, LOW_RANK = (["--baseline", name, "--adapter_rank", "4"] for name in ("lora", "low_rank"))


@pytest.mark.parametrize(
    "optim", [I3S, [*RELORA, "--matrix_learning_rate", "5e-3", "--dtype", "bfloat16"], LORA, LOW_RANK]
)
def test_resumed_equals_uninterrupted(main, tmp_path, texts, optim):
    """Streamed files, accumulation, a second epoch of the data: weights, losses, tokens are the same bit for bit."""
    line = [*TINY, *texts, *optim, "--do_train", "--total_batch_size", 8, "--max_steps", 12, "--save_steps", 5]
    line += ["--output_dir", tmp_path]
    main(*line)
    whole, log = load_file(tmp_path / "model.safetensors"), history(tmp_path)
    assert json.loads((tmp_path / "checkpoint-10" / STREAM_FILE).read_text())["epoch"] == 1
    for cut in (5, 10):
        main(*line, "--resume_from_checkpoint", tmp_path / f"checkpoint-{cut}")
        resumed = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert history(tmp_path) == log


def test_a_checkpoint_without_a_position_is_read_up_to(main, tmp_path, texts):
    line = [*TINY, *texts, *I3S, "--do_train", "--max_steps", 4, "--save_steps", 2, "--output_dir", tmp_path]
    main(*line)
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "checkpoint-2" / STREAM_FILE).unlink()
    shutil.rmtree(tmp_path / "checkpoint-4")
    main(*line, "--resume_from_checkpoint", "true")
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_worker_reads_the_same_rows_and_resumes_exactly(main, tmp_path, texts):
    line = [*TINY, *texts, *I3S, "--do_train", "--total_batch_size", 4, "--max_steps", 4, "--save_steps", 2]
    main(*line, "--output_dir", tmp_path / "plain")
    line += ["--dataloader_num_workers", 1, "--output_dir", tmp_path / "worker"]
    main(*line)
    whole = load_file(tmp_path / "worker" / "model.safetensors")
    shutil.rmtree(tmp_path / "worker" / "checkpoint-4")
    main(*line, "--resume_from_checkpoint", "true")
    for other in ("plain", "worker"):
        weights = load_file(tmp_path / other / "model.safetensors")
        assert all(torch.equal(whole[name], weights[name]) for name in whole)


def history(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["tokens"]) for entry in log if "loss" in entry]


@pytest.mark.parametrize("optim", [I3S, ["--optim", "galore_i3s_adamw_layerwise", *I3S[2:]], ["--baseline", "adamw"]])
def test_pure_bf16_with_activation_checkpointing(main, tmp_path, texts, optim):
    """Weights in bf16, state in fp32 for AdamW too; layerwise; and it learns."""
    options = ["--dtype", "bfloat16", "--gradient_checkpointing", "true", "--max_steps", 12, "--save_steps", 12]
    main(*TINY, *texts, *optim, *options, "--do_train", "--do_eval", "--output_dir", tmp_path)
    assert {p.dtype for p in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    saved = torch.load(tmp_path / "checkpoint-12" / "optimizer.pt", weights_only=True)["state"].values()
    assert {x.dtype for s in saved for x in s.values() if x.dim() == 2} == {torch.float32}
    losses = [loss for _, loss, _ in history(tmp_path)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("baseline", ["relora", "low_rank", "sltrain", "remora"])
def test_a_baseline_leaves_an_ordinary_model(main, tmp_path, texts, baseline):
    line = [*TINY, *texts, *I3S, "--max_steps", 4, "--save_steps", 2, "--output_dir", tmp_path, "--adapter_rank", 4]
    line += ["--baseline", baseline, "--relora_every", 2, "--relora_warmup", 1]
    main(*line, "--do_train", "--do_eval")
    found = json.loads((tmp_path / "all_results.json").read_text())
    main(*TINY, *texts, "--do_eval", "--output_dir", tmp_path, "--resume_from_checkpoint", tmp_path, "--max_steps", 1)
    again = json.loads((tmp_path / "all_results.json").read_text())
    assert found["eval_perplexity"] == pytest.approx(again["eval_perplexity"], rel=1e-4)  # saved merged, fp32


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["TEXTS", "--do_train", "--baseline", "mezo"], "--baseline mezo is for fine-tuning alone; adamw, adamw_8bit"),
        (
            ["TEXTS", "--do_train", "--baseline", "sltrain", "--sltrain_density", "1"],
            "--sltrain_density must be above",
        ),
        (["TEXTS", "--model_size", "60"], "--model_size 60 is none of 9m, 20m"),
        (["TEXTS", "--text_column", "body"], "has no column 'body' but text, url; name one with --text_column"),
        (["TEXTS", "--packing", "--block_size", "99999"], "fewer than 99999 tokens"),
        (["TEXTS", "--max_steps", "-1"], "--max_steps or --train_tokens"),
        (["TEXTS", "--total_batch_size", "3"], "--total_batch_size 3 is no multiple of the 2 rows"),
        (["TEXTS", "--optim_args", "rnak=3"], "rnak"),
        (["TEXTS", "--tokenizer", "google-t5/t5-base"], "cannot load the tokenizer google-t5/t5-base"),
        (["TEXTS", "--resume_from_checkpoint", "true"], "there is no checkpoint to resume from"),
        (["--train_file", "EMPTY", "--validation_file", "EMPTY"], "empty.jsonl is empty"),
        (["--train_file", "BROKEN", "--validation_file", "BROKEN"], "cannot read"),
        (["--train_file", "nowhere.jsonl", "--validation_file", "nowhere.jsonl"], "there is no such file"),
        (["--train_file", "picture.png"], "go together"),
        (["--train_file", "PARQUET", "--validation_file", "PARQUET"], "cannot read"),
        (["TEXTS", "--optim", "galore_i3s_adam"], "--optim galore_i3s_adam is no choice; galore_i3s_adamw"),
        (["TEXTS", "--block_size", "1"], "--block_size must be at least 2, not 1"),
        (["TEXTS", "--vocab_size", "10"], "--vocab_size must be at least 257, not 10"),
        (["TEXTS", "--num_hidden_layers", "-1"], "--num_hidden_layers must be at least 1, not -1"),
        (["TEXTS", "--matrix_learning_rate", "-1"], "--matrix_learning_rate must be at least 0, not -1"),
        (["TEXTS", "--tokenizer_dir", "EMPTY"], "cannot write to"),
        (["TEXTS", "--output_dir", "EMPTY"], "cannot write to"),
        (["TEXTS", "--dataloader_num_workers", "2"], "--dataloader_num_workers must be 0 or 1"),
        (["TEXTS", "--resume_from_checkpoint", "FOLDER"], "holds no checkpoint to resume from"),
        (["--dataset", "allenai/c4"], "cannot load allenai/c4 from the hub"),
    ],
)
def test_errors_are_one_sentence(main, monkeypatch, tmp_path, texts, capsys, options, sentence):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": "half a li')
    (tmp_path / "broken.parquet").write_text("PAR1")
    names = {"EMPTY": "empty.jsonl", "BROKEN": "broken.jsonl", "PARQUET": "broken.parquet", "FOLDER": "."}
    names = {name: str(tmp_path / file) for name, file in names.items()}
    line = [part for option in options for part in (texts if option == "TEXTS" else [names.get(option, option)])]
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(*TINY, *I3S, "--do_train", "--max_steps", 2, "--output_dir", out, *line)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run.py: ")]
    assert len(lines) == 1 and sentence in lines[0]
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("rnak: 3\n", "sets rnak, which is no option"), ("[1", "is not YAML"), ("", "holds no `option: value` lines")],
)
def test_errors_in_files(main, tmp_path, capsys, text, sentence):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(tmp_path / "bad.yaml")
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.processes
def test_two_processes_see_the_rows_of_one(main, tmp_path, texts):
    """Same rows per step: the same tokens, the same losses up to the order of sums; and an exact resume."""
    line = [*TINY, *texts, *I3S, "--do_train", "--total_batch_size", 8, "--max_steps", 12, "--save_steps", 5]
    main(*line, "--output_dir", tmp_path / "one")
    several = [*line, "--output_dir", tmp_path / "two"]
    done = torchrun(2, run.__file__, *several)
    assert done.returncode == 0, done.stderr
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert [tokens for *_, tokens in one] == [tokens for *_, tokens in two]
    # losses are averaged over processes before they are logged, over tokens of different numbers: a few per cent
    assert [loss for _, loss, _ in one] == pytest.approx([loss for _, loss, _ in two], rel=0.03)
    whole = load_file(tmp_path / "two" / "model.safetensors")
    done = torchrun(2, run.__file__, *several, "--resume_from_checkpoint", tmp_path / "two" / "checkpoint-5")
    assert done.returncode == 0, done.stderr
    resumed = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert history(tmp_path / "two") == two


@pytest.mark.full
@pytest.mark.processes
def test_a_loader_with_workers_resumes_by_reading(main, tmp_path, texts):
    line = [*TINY, *texts, *I3S, "--do_train", "--max_steps", 4, "--save_steps", 2, "--output_dir", tmp_path]
    line += ["--dataloader_num_workers", 1]
    main(*line)
    whole = load_file(tmp_path / "model.safetensors")
    main(*line, "--resume_from_checkpoint", tmp_path / "checkpoint-2")
    resumed = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
