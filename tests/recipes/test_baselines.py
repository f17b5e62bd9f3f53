"""The baselines on a tiny LLaMA under the real Trainer: what trains, what a checkpoint holds, exact resume."""

import math
from copy import deepcopy

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import TOKENS, tiny, trained
from torch import nn
from transformers import TrainingArguments

import hf_lowrank
from recipes.shared.baselines import KINDS, BaselineArguments, adapter_parameters, prepare_, to_plain_
from recipes.shared.baselines.factorized import FactorizedLinear
from recipes.shared.baselines.restarts import jagged, merge_and_restart_, reset_


def test_relora_checkpoints_hold_the_merged_base(tmp_path):
    trained(tmp_path, "relora", steps=5)
    name = "model.layers.0.self_attn.q_proj.base_layer.weight"
    before = tiny().model.layers[0].self_attn.q_proj.weight
    first, second, third, fourth = (
        load_file(tmp_path / f"checkpoint-{i}" / "model.safetensors") for i in (1, 2, 3, 4)
    )
    assert torch.equal(first[name], before)  # frozen until the first merge
    assert not torch.equal(second[name], before)
    assert torch.equal(third[name], second[name])
    assert not second["model.layers.0.self_attn.q_proj.lora_B.default.weight"].any()
    drawn = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert not torch.equal(second[drawn], fourth[drawn])  # two merges, two draws


def test_a_merge_changes_nothing_that_the_model_computes():
    model = tiny()
    prepare_(model, BaselineArguments("relora", adapter_rank=2), TrainingArguments("unused", use_cpu=True))
    generator = torch.Generator().manual_seed(1)
    for name in adapter_parameters(model):
        p = model.get_parameter(name)
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    model.eval()  # no dropout
    parameters = {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        before = model(TOKENS[:4]).logits
        merge_and_restart_(model, torch.Generator().manual_seed(0))
        after = model(TOKENS[:4]).logits
    # fp32: each entry is a sum of about a hundred rounded products through two layers
    torch.testing.assert_close(after, before, atol=1e-5 * before.abs().max().item(), rtol=0)
    assert not torch.equal(after, before)  # there was something to merge
    assert parameters == {name: id(p) for name, p in model.named_parameters()}  # the optimizer keeps its keys


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit"])
def test_a_merge_resets_the_state_of_the_factors_alone(tmp_path, optim):
    """With bitsandbytes the smallest tensors are kept in fp32; 8-bit ones are tested on `reset_` itself."""
    trainer = trained(tmp_path, "relora", steps=5, optim=optim)  # step 4 is a merge
    names = {p: name for name, p in trainer.model.named_parameters()}
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt")["state"]
    order = [names[p] for group in trainer.optimizer.param_groups for p in group["params"]]
    inside = "__bnb_optimizer_quant_state__"  # where bitsandbytes saves what it keeps
    state = {order[number]: {**s, **s.get(inside, {})} for number, s in saved.items()}
    factors = set(adapter_parameters(trainer.model))
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    keys = ("state1", "state2") if "8bit" in optim else ("exp_avg", "exp_avg_sq")
    reset = {name for name, s in state.items() if s["step"] == 0 and not any(s[key].any() for key in keys)}
    assert set(state) == trainable and reset == factors
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= trainable - factors
    assert not any(".base_layer." in name for name in trainable)


def test_8bit_moments_are_nothing_after_a_reset():
    # Trainer registers embeddings as 32-bit by their place in the optimizer, for all optimizers of the process
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    p = nn.Parameter(torch.randn(64, 128))
    optimizer = bitsandbytes.optim.AdamW8bit([p], lr=1e-2, weight_decay=0.0)
    fresh = nn.Parameter(p.detach().clone())
    other = bitsandbytes.optim.AdamW8bit([fresh], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    assert optimizer.state[p]["state1"].dtype == torch.uint8
    reset_(optimizer.state[p])
    p.data.copy_(fresh)
    p.grad = fresh.grad = torch.randn_like(p)
    optimizer.step()
    other.step()
    assert torch.equal(p, fresh)  # as a new optimizer


def test_the_learning_rate_is_the_jagged_cosine(tmp_path):
    """Against the formula of the ReLoRA paper's code: w, K, wr and floor written out."""
    T, w, K, wr, floor = 24, 3, 8, 2, 0.1

    def c(x):
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (x - w) / (T - w)))

    def written_out(t):
        if t < w:
            return t / w
        if t >= K and t % K < wr:
            return (t % K) / wr * c(t // K * K + wr)
        return c(t)

    curve = jagged(lambda t: t / w if t < w else c(t), every=K, warmup=wr)
    assert [curve(t) for t in range(T)] == pytest.approx([written_out(t) for t in range(T)])
    trainer = trained(tmp_path, "relora", steps=6, warmup_steps=1)  # Trainer's own cosine, restarts at 2 and 4
    rates = [entry["learning_rate"] / 1e-2 for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[2] == rates[4] == 0.0  # the first step after a merge: k / w = 0
    assert rates[0] == 0.0 and rates[1] == 1.0 and 0.1 <= rates[5] < rates[3] < 1.0


@pytest.mark.parametrize(("baseline", "bits"), [("adamw", 32), ("adamw_8bit", 8)])
def test_the_dense_baselines_are_values_of_optim(tmp_path, baseline, bits):
    trainer = trained(tmp_path, baseline, steps=2)
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer).__name__ == "AdamW"  # torch's, or bitsandbytes'
    assert getattr(getattr(optimizer, "args", None), "optim_bits", 32) == bits
    assert all(p.requires_grad for p in trainer.model.parameters())


def test_a_dense_choice_of_optim_stays(tmp_path):
    hf_lowrank.register()
    args = TrainingArguments(str(tmp_path), optim="adamw_bnb_8bit", use_cpu=True)
    prepare_(tiny(), BaselineArguments("lora", adapter_rank=2), args)
    assert args.optim == "adamw_bnb_8bit"


def test_fine_tuning_trains_adapters_and_the_head():
    model = tiny()
    args = BaselineArguments("lora", adapter_rank=2, adapter_targets="q_proj,v_proj")
    prepare_(model, args, TrainingArguments("unused", use_cpu=True), also_train="lm_head")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {*adapter_parameters(model), "lm_head.weight"}
    assert len(adapter_parameters(model)) == 2 * 2 * 2  # layers, modules, factors


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_starts_as_the_model_and_merges_to_what_it_computes(kind):
    model = tiny().eval()
    args = BaselineArguments(baseline="lora", adapter_kind=kind, adapter_rank=2, adapter_dropout=0.0)
    scale = 3e-5  # of the logits, through two layers in fp32
    with torch.no_grad():
        plain = model(TOKENS[:4]).logits
        prepare_(model, args, TrainingArguments("unused", use_cpu=True), also_train="(?!)")
        start = model(TOKENS[:4]).logits
        torch.testing.assert_close(start, plain, atol=scale * plain.abs().max().item(), rtol=0)
        generator = torch.Generator().manual_seed(0)
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        after = model(TOKENS[:4]).logits
        assert (after - start).abs().max() > 0.05 * start.abs().max()
        low = deepcopy(model).to(torch.bfloat16)
        exact = deepcopy(low).float()
        for one in (model, low, exact):
            to_plain_(one)
        merged = model(TOKENS[:4]).logits
    torch.testing.assert_close(merged, after, atol=scale * after.abs().max().item(), rtol=0)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}  # merged in fp32, and rounded once
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(low.parameters(), exact.parameters(), strict=True))
    width, inner, rank = 16, 24, 2
    factors = 2 * rank * (4 * 2 * width + 3 * (width + inner))  # r (m + n) of seven matrices in two layers
    norms = 2 * (4 * width + 2 * inner + width) if kind == "dora" else 0  # one for every output
    assert sum(p.numel() for p in trained) == factors + norms


def test_factors_start_as_the_best_approximation():
    linear = nn.Linear(12, 8)
    U, S, Vh = torch.linalg.svd(linear.weight.detach())
    layer = FactorizedLinear(linear, rank=3)
    best = (U[:, :3] * S[:3]) @ Vh[:3]
    torch.testing.assert_close(layer.product().weight, best, atol=1e-6, rtol=0)  # weights are below 0.3: fp32 rounding
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer(x), x @ best.T + linear.bias, atol=1e-5, rtol=0)
    full = FactorizedLinear(linear, rank=99)
    torch.testing.assert_close(full(x), linear(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"baseline": "relora", "relora_warmup": 9, "relora_every": 9}, "--relora_warmup must be"),
        ({"baseline": "lora", "adapter_kind": "dola"}, "--adapter_kind must be one of lora, rslora, dora"),
        ({"baseline": "relora", "adapter_kind": "dora"}, "DoRA's norms would change"),
        ({"baseline": "loar"}, "--baseline must be one of adamw, adamw_8bit, .*, not 'loar'"),
        (
            {"baseline": "lora", "adapter_kind": "olora", "adapter_rank": 17},
            "has a short side of 16: --adapter_rank 17",
        ),
        ({"baseline": "lora", "adapter_rank": 0}, "--adapter_rank must be at least 1, not 0"),
        ({"baseline": "lora", "adapter_targets": "qproj"}, "matches no trainable matrix"),
    ],
)
def test_errors_say_what_to_do(options, words):
    with pytest.raises(ValueError, match=words):
        prepare_(tiny(), BaselineArguments(**options), TrainingArguments("unused", use_cpu=True))
