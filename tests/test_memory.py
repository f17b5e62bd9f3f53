"""Estimates against what a step really allocates, and against the papers' columns."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from fitting import fitting
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lowrank
from hf_lowrank import LowRankOptimizer, param_groups
from hf_lowrank.hf import models
from hf_lowrank.observe import counting, describe
from hf_lowrank.planning import activations, budget, memory, targets
from hf_lowrank.state import view


TABLES = Path(__file__).parents[1] / "recipes" / "benchmarks" / "memory_tables.py"


@pytest.fixture(scope="module")
def memory_tables():
    """The recipe, imported by its path, with its folder on the path as where it is run."""
    spec = importlib.util.spec_from_file_location("memory_tables", TABLES)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(TABLES.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TABLES.parent))
        sys.modules.pop("tables", None)  # a name that others may want
    return module


def tiny():
    """A LLaMA whose moments are partly above the 4096 elements from which on they are quantised."""
    sizes = {"hidden_size": 48, "intermediate_size": 120, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=199, tie_word_embeddings=False))


def real_bytes(model, optim, **options):
    """Bytes of the state after one real step on a gradient."""
    pair = hf_lowrank.optimizer_cls_and_kwargs(model, optim, **options)
    optimizer = pair[0](**pair[1])
    optimizer.train()  # the hooks of the layerwise mode
    ids = torch.arange(64).view(2, 32)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    kept = {group: 0 for group in (True, False)}
    for group in optimizer.param_groups:
        kept["rank" in group] += sum(view.nbytes(optimizer.state[p]) for p in group["params"])
    return kept[True], kept[False], optimizer.declared_bytes()


@pytest.mark.parametrize("ending", ["", "_8bit", "_layerwise", "_8bit_layerwise"])
@pytest.mark.parametrize("row", hf_lowrank.METHODS)
def test_state_is_what_the_first_step_allocates(row, ending):
    rank = fitting(row, {"rank": 40})["rank"]
    low_rank, dense, declared = real_bytes(tiny(), row + ending, **fitting(row, {"rank": 40}))
    with torch.device("meta"):
        shapes = tiny()
    estimate = memory.estimate_memory(shapes, row + ending, rank=rank, dtype="fp32")
    assert (estimate.low_rank_state, estimate.dense_state) == (low_rank, dense)
    assert estimate.state == declared


def test_state_formats_count():
    options = {"basis_format": "4bit", "state_format": "4bit", "dense_state_format": "8bit"}
    low_rank, dense, _ = real_bytes(tiny(), "fira_adamw", rank=0.5, **options)
    estimate = memory.estimate_memory(tiny(), "fira_adamw", rank=0.5, options=options)
    assert (estimate.low_rank_state, estimate.dense_state) == (low_rank, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_counted_like_torch_allocates_it(dtype):
    model = tiny().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    estimate = memory.estimate_memory(tiny(), "adamw_torch", dtype=name)
    assert estimate.state == sum(view.nbytes(s) for s in optimizer.state.values())
    assert estimate.gradients == sum(p.grad.nbytes for p in model.parameters()) == estimate.weights


def mixed():
    """A model whose head and norms are in fp32 and everything else in bf16, as some recipes keep them."""
    model = tiny().to(torch.bfloat16)
    for name, module in model.named_modules():
        if "norm" in name or name == "lm_head":
            module.float()
    return model


@pytest.mark.parametrize("make", [tiny, lambda: tiny().to(torch.bfloat16), mixed], ids=["fp32", "bf16", "mixed"])
def test_all_say_the_same_of_adamw(make, tmp_path):
    """The line at the start, `targets`, `memory`, the run's file and the report, beside what torch allocates."""
    pytest.importorskip("matplotlib")
    from hf_lowrank.observe.report.costs import bars
    from hf_lowrank.observe.report.runs import Run

    model = make()
    adamw = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    adamw.step()
    real = sum(view.nbytes(s) for s in adamw.state.values())
    optimizer = LowRankOptimizer(param_groups(model, rank=16), "fira_adamw")
    assert sum(row.adamw_bytes for row in targets.plan(make(), "fira_adamw", rank=16)) == real
    assert memory.estimate_memory(make(), "adamw_torch", dtype="model").state == real
    run = describe.described(optimizer, model)
    assert run["memory"]["adamw_state"] == real
    assert f"(AdamW: {real / 2**20:.1f} MiB)" in describe.summary(optimizer)
    assert bars([Run(tmp_path, "ours", described=run)])["AdamW"]["dense_state"] == real
    estimate = memory.estimate_memory(make(), "fira_adamw", rank=16, dtype="model")
    for part in ("weights", "gradients", "low_rank_state", "dense_state"):
        assert run["memory"][part] == getattr(estimate, part), part


def test_what_layerwise_holds_is_counted_once():
    model = mixed()
    optimizer = LowRankOptimizer(param_groups(model, rank=16, layerwise=True), "galore_i3s_adamw")
    estimate = memory.estimate_memory(mixed(), "galore_i3s_adamw", rank=16, dtype="model", layerwise=True)
    held = describe.described(optimizer, model)["memory"]
    assert held["gradients"] == estimate.gradients < held["adamw_gradients"] == estimate.weights


def test_layerwise_gradients_are_what_is_alive_before_step():
    """All matrices have been projected: R in fp32 is left of them, and the gradients of everything else."""
    model = tiny()
    groups = hf_lowrank.param_groups(model, rank=16, layerwise=True, stagger=False)
    optimizer = hf_lowrank.LowRankOptimizer(groups, "galore_dominant_adamw")
    optimizer.train()
    ids = torch.arange(64).view(2, 32)
    model(input_ids=ids, labels=ids).loss.backward()
    alive = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    alive += sum(x.nbytes for unit in optimizer.layerwise.waiting.values() for x in unit.started[1].tensors)
    estimate = memory.estimate_memory(
        tiny(), "galore_dominant_adamw", rank=16, dtype="fp32", layerwise=True, options={"stagger": False}
    )
    sizes = [p.nbytes for group in optimizer.param_groups if "rank" in group for p in group["params"]]
    # during backward one matrix's gradient is there as well, and at a refresh all are
    assert estimate.gradients == alive + max(sizes) + sum(sizes)
    assert estimate.layerwise


@pytest.mark.parametrize("gap, stagger", [(3, True), (40, True), (3, False)])
def test_gradients_that_wait_for_a_refresh_are_counted(gap, stagger):
    layers = torch.nn.Sequential(*[torch.nn.Linear(8 + i % 3, 8 + (i + 1) % 3, bias=False) for i in range(12)])
    options = {"rank": 2, "update_proj_gap": gap, "stagger": stagger}
    optimizer = LowRankOptimizer(param_groups(layers, layerwise=True, **options), "galore_dominant_adamw")
    optimizer.train()
    most = 0
    for step in range(2 * gap + 1):
        layers(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        most = max(most, sum(p.grad.nbytes for p in layers.parameters() if p.grad is not None))
        optimizer.step()
    projected = sum(4 * 2 * max(p.shape) for p in layers.parameters())
    assert (
        counting.gradient_bytes(optimizer.declared()) == projected + max(p.nbytes for p in layers.parameters()) + most
    )


def test_an_estimate_says_nothing_of_parameters_that_are_trained_later():
    model = torch.nn.Sequential(torch.nn.Linear(32, 24, bias=False), torch.nn.Linear(24, 32, bias=False))
    model[1].weight.requires_grad_(False)
    optimizer = LowRankOptimizer(param_groups(model, method="galore_i3s_adamw", rank=8))
    memory.estimate_memory(model, "fira_adamw", rank=2)
    targets.plan(model, "fira_adamw", rank=2, weight_decay=0.1)
    model[1].weight.requires_grad_(True)
    optimizer.add_param_group({"params": [model[1].weight]})
    assert [(group["method"], group["rank"]) for group in optimizer.param_groups] == 2 * [("galore_i3s_adamw", 8)]


@pytest.mark.processes
def test_planning_needs_transformers_for_models_by_name_alone():
    code = """
import sys, torch
sys.modules["transformers"] = None  # as where it is not installed
from hf_lowrank.observe import counting, units
from hf_lowrank.planning import activations, budget, memory, targets
net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 32))
assert memory.estimate_memory(net, "fira_adamw", rank=4).state > 0 and len(targets.plan(net, "ldadam", rank=4)) == 4
try:
    memory.estimate_memory("60m", "fira_adamw")
except ValueError as error:
    assert "need transformers" in str(error)
else:
    raise AssertionError
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_seven_billion_parameters_take_seconds():
    start = time.process_time()
    estimate = memory.estimate_memory("7b", "galore_i3s_adamw_8bit_layerwise", rank=1024)
    assert time.process_time() - start < 30  # about two
    assert estimate.parameters == 6_738_415_616
    assert estimate.weights == 2 * estimate.parameters


def saved_by_autograd(model, batch, seq):
    """Bytes of the logits and of what autograd keeps for the backward pass, parameters aside, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    ids = torch.zeros(batch, seq, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = model(input_ids=ids, labels=ids)
    pack(output.logits)
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activation_rule_is_near_what_autograd_keeps(dtype):
    config = LlamaConfig(**models.llama_config("20m"))
    model = LlamaForCausalLM(config).to(memory.DTYPES[dtype]).train()
    kept = saved_by_autograd(model, 2, 64)
    rule = activations.activation_bytes(
        model, batch=2, seq=64, itemsize=memory.DTYPES[dtype].itemsize, checkpointing=False
    )
    print(rule / kept)
    assert 0.9 < rule / kept < 1.1


SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 176}
IMAGES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
PLAIN = transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig(**TEXT)


@pytest.mark.parametrize("kind, config, near", [
    (*PLAIN, 1.0),
    (transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Config(
        text_config=TEXT, vision_config={**IMAGES, "image_size": 28, "patch_size": 14}), 1.0),
    (transformers.MistralForCausalLM, transformers.MistralConfig(**{**TEXT, "num_hidden_layers": 4}), 1.8),
    (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(
        **TEXT, moe_intermediate_size=88, num_experts=4, num_experts_per_tok=2), 1.0),
], ids=["text alone", "with images", "twice the layers", "two experts of half the width"])  # fmt: skip
def test_sizes_are_found_wherever_a_config_has_them(kind, config, near):
    rule = {"batch": 2, "seq": 64, "itemsize": 4, "checkpointing": False}
    plain, other = (activations.activation_bytes(kind(config), **rule) for kind, config in (PLAIN, (kind, config)))
    assert other / plain == pytest.approx(near, rel=0.15)  # logits and norms are no part of the layers


def test_a_budget_is_kept_and_used():
    fitting = budget.fit_budget("7b", memory.parse_bytes("24GB"), "galore_i3s_adamw")
    assert fitting
    for estimate in fitting:
        assert estimate.total <= 24e9 and estimate.model == "7b"
        given = {"checkpointing": estimate.checkpointing, "layerwise": estimate.layerwise}
        more = memory.estimate_memory("7b", estimate.optim, rank=2 * estimate.rank, **given)
        assert more.total > 24e9 or estimate.rank == 2048
    assert budget.fit_budget("7b", 10**9) == []
    assert budget.fit_budget("60m", "1GB") == budget.fit_budget("60m", 10**9) != []
    assert {found.rank for found in budget.fit_budget("60m", "2GB", "muon_4bit")} == {None}  # it has none
    assert {found.rank for found in budget.fit_budget("60m", "2GB", "gwt_adamw")} <= {2.0**-i for i in range(1, 7)}
    assert {found.rank for found in budget.fit_budget("60m", "2GB", options={"rank": 100})} == {100}
    for amount in (0, -1, "24"):
        with pytest.raises(ValueError, match="must be above 0|not an amount of memory"):
            budget.fit_budget("60m", amount)
    with pytest.raises(ValueError, match="tries layerwise and the plain mode by itself"):
        budget.fit_budget("60m", "1GB", options={"layerwise": "offload"})


@pytest.mark.parametrize("strategy, optim, options, reason", [
    ("ddp", "fira_adamw_layerwise", {}, "whole gradients.* use FSDP2"),
    ("ddp", "galore_i3s_adamw", {"layerwise": "offload"}, "whole gradients.* use FSDP2"),
    ("ddp_sharded", "galore_i3s_adamw_layerwise", {}, "does not go together with layerwise"),
    ("", "galore_i3s_adamw", {"shard_state": True, "reduce_projected": True}, "which needs every basis"),
    ("fsdp2", "galore_i3s_adamw", {"reduce_projected": True}, "reduce_projected is for DistributedDataParallel"),
    ("fsdp2", "galore_i3s_adamw", {"async_refresh": 2}, "leave out async_refresh"),
    ("fsdp2", "galore_i3s_adamw", {"proj_type": "full"}, "does not run on sharded weights"),
    ("fsdp2", "galore_i3s_adamw", {"shard_basis": True, "basis_format": "4bit"}, "shard_basis keeps pieces"),
    ("fsdp2", "galore_i3s_adamw", {"shard_state": True}, "shard_state is for DistributedDataParallel"),
    ("tp", "gwt_adamw", {"rank": 0.5}, "adds up neighbours along .*o_proj.weight"),
    ("tp", "foam_adamw", {"rank": 0.5}, "adds up neighbours along .*o_proj.weight"),
    ("tp", "full_adamw_8bit", {}, r"o_proj.weight is split on another axis than its first \(1\)"),
    ("tp", "ldadam_8bit", {}, "across blocks of its 8-bit or 4-bit state"),
    ("tp", "galore_i3s_adamw", {"proj_type": "full"}, "does not run on sharded weights"),
])  # fmt: skip
def test_what_training_refuses_has_no_figures(strategy, optim, options, reason):
    with pytest.raises(ValueError, match=reason):
        memory.estimate_memory("60m", optim, gpus=2, strategy=strategy, options=options)
    modes = {found.layerwise for found in budget.fit_budget("60m", "2GB", "fira_adamw", gpus=2)}
    assert modes == {False}  # a budget passes over them


@pytest.mark.parametrize("value, strategy", [("false", "ddp"), ("true", "ddp_sharded")])
def test_shard_state_is_read_as_the_trainer_reads_it(value, strategy):
    found = memory.estimate_memory("9m", "galore_i3s_adamw", rank=8, gpus=2, options={"shard_state": value})
    assert found.strategy == strategy
    with pytest.raises(ValueError, match="shard_state must be true or false, got 'maybe'"):
        memory.estimate_memory("9m", "galore_i3s_adamw", rank=8, gpus=2, options={"shard_state": "maybe"})


def test_options_of_ours_are_none_of_torchs():
    with pytest.raises(ValueError, match="adamw_torch is torch's, and has none of these options: layerwise"):
        memory.estimate_memory("9m", "adamw_torch", layerwise=True)
    assert memory.estimate_memory("9m", "adamw_torch", layerwise=False).layerwise is False


def test_a_budget_that_nothing_runs_in_says_why():
    with pytest.raises(ValueError, match="leave out async_refresh"):
        budget.fit_budget("60m", "24GB", options={"async_refresh": 2}, gpus=2, strategy="fsdp2")


def test_text_and_json():
    estimate = memory.estimate_memory("9m", "galore_i3s_adamw", rank=32, batch=2)
    assert "optimizer state, matrices" in estimate.table() and "rank 32" in estimate.table()
    read = json.loads(estimate.json())
    assert read["total"] == estimate.total == read["weights"] + read["gradients"] + read["state"] + read["activations"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("24g", 24 * 10**9),
        ("1.5 mb", 1_500_000),
        ("17000000", 17_000_000),
    ],
)
def test_amounts_of_memory(text, count):
    assert memory.parse_bytes(text) == count


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: memory.estimate_memory("61m", "galore_i3s_adamw"), "60m"),
        (lambda: memory.estimate_memory("9m", "galore_i3_adamw"), "galore_i3s_adamw"),
        (lambda: memory.estimate_memory("9m", "galore_i3s_adamw", dtype="int8"), "fp32"),
        (lambda: memory.estimate_memory("9m", "galore_i3s_adamw", options={"rnak": 3}), "rank"),
        (lambda: memory.parse_bytes("24 GPUs"), "24GiB"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_config_file_is_a_model(tmp_path):
    LlamaConfig(**models.llama_config("9m"), architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    by_name = memory.estimate_memory("9m", "galore_i3s_adamw", rank=32)
    for place in (tmp_path, tmp_path / "config.json"):
        assert memory.estimate_memory(place, "galore_i3s_adamw", rank=32).total == by_name.total


def test_a_model_without_a_config():
    estimate = memory.estimate_memory(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)), "fira_adamw", rank=4)
    assert estimate.activations == 0 and estimate.state > 0


AGREEING = {
    "full rank, 350M",
    "low rank, 60M",
    "7B weights (introduction)",
    "7B weight gradients freed layer by layer (section 5.5)",
    "7B 8-bit Adam, weights and states (Table 3)",
    "7B 8-bit GaLore, weights and states (Table 3)",
    "RoBERTa-base, full fine-tuning",
}


def test_the_papers_columns(memory_tables):
    tables = [*memory_tables.pretraining(), *memory_tables.seven_billion(), *memory_tables.roberta()]
    assert {row.what for row in tables if row.verdict == "agrees"} == AGREEING
    for row in memory_tables.pretraining():
        # the worst are GaLore at 60M (0.24 beside 0.26) and LoRA at 60M (0.36 beside 0.31)
        assert abs(float(row.paper.split()[0]) - row.scaled[1]) < 0.27 * row.scaled[1]
    for row in tables:
        assert row.verdict == "agrees" or row.note


def test_numbers_that_must_agree_by_hand(memory_tables):
    """A square matrix keeps m r + 2 n r, counted by hand for one layer of 60M at rank 128."""
    n = memory_tables.numbers("60m", 128)
    square, mlp = 4 * 3 * 512 * 128, 3 * (512 * 128 + 2 * 1376 * 128)
    assert n["low-rank states"] == 8 * (square + mlp)
    assert n["dense states"] == 2 * (2 * 32000 * 512 + 17 * 512)
