"""C4 pretraining: the files hold the papers' values, transformers reads them, models have the papers' sizes."""

from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import hf_lowrank
from recipes.c4_pretraining import models, run
from recipes.shared.rates import optimizer_with_two_rates


ALL = sorted((Path(run.__file__).parent / "configs").glob("*.yaml"))
SLTRAIN = [file for file in ALL if file.stem.startswith("sltrain_")]
CONFIGS = [file for file in ALL if file not in SLTRAIN]


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


@pytest.mark.parametrize("file", SLTRAIN, ids=lambda file: file.stem)
def test_sltrains_files_hold_its_scripts_values(file):
    model, _, budget, baseline, args = run.parse([str(file)])
    assert file.stem == f"sltrain_{model.model_size}" and model.dtype == "bfloat16"
    assert (baseline.baseline, baseline.sltrain_density, args.learning_rate) == ("sltrain", 0.03, 3e-3)
    expected = {
        "60m": (128, 32, 11_000),
        "130m": (256, 16, 22_000),
        "350m": (256, 16, 65_000),
        "1b": (512, 8, 140_000),
    }
    assert (baseline.adapter_rank, baseline.adapter_alpha, args.max_steps) == expected[model.model_size]
    assert args.warmup_steps == args.max_steps // 10 and (args.adam_beta2, args.weight_decay) == (0.999, 0.0)
    run.set_accumulation(budget, args)
    assert run.rows_per_step(args) == budget.total_batch_size == 512


PUBLISHED = {
    # GaLore: appendix C, Table 5, and the scripts. I3S: Tables 1 and 2. SubTrack: Table 5. The others: their scripts.
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
    "subtrack_pp_60m": ("rank=128,update_proj_gap=200,scale=0.25", 1e-3, 10_000, 256, 0.0),
    "subtrack_pp_7b": ("rank=1024,update_proj_gap=500,scale=0.25", 1e-4, 10_000, 16, 0.0),
    "subtrack_pp_1b": ("rank=512,update_proj_gap=200,scale=0.25", 1e-4, 10_000, 16, 0.0),
    "apollo_130m": ("rank=192,update_proj_gap=200,scale=1.0", 1e-2, 20_000, 512, 0.0),
    "apollo_7b": ("rank=256,update_proj_gap=200,scale=1.0", 1e-2, 150_000, 512, 0.0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_files_hold_the_papers_values(name):
    _, _, budget, _, args = parsed(next(file for file in CONFIGS if file.stem == name))
    length = budget.train_tokens or args.max_steps
    found = (args.optim_args, args.learning_rate, length, budget.total_batch_size, args.max_grad_norm)
    assert found == PUBLISHED[name]
    eps = 1e-8 if args.optim.endswith("_8bit_layerwise") else 1e-6  # bitsandbytes' default, GaLore's
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.weight_decay) == (0.9, 0.999, eps, 0.0)


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
        rates[optim] = {name: rate for rate, group in lr for name in group["param_names"]}
    assert rates["adamw_torch"] == rates["galore_i3s_adamw"]
    training = TrainingArguments(str(tmp_path), optim="apollo_mini_adamw", learning_rate=1e-2, use_cpu=True)
    _, kwargs = optimizer_with_two_rates(model, training, matrix_learning_rate=0.25e-2)
    (by_root,) = {
        group["lr"] * 128**0.5 for group in kwargs["params"] if "rank" in group
    }  # APOLLO's factor is the root
    assert by_root == pytest.approx(0.25e-2)
    slow = {name for name, lr in rates["adamw_torch"].items() if lr == 0.25e-2}
    assert slow == {name for name in rates["adamw_torch"] if "proj" in name}
