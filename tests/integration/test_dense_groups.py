"""Embeddings, heads and vectors with rates and rules of their own: which parameters they are, and runs of Trainer."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import arguments, engine, tiny_data, tiny_llama, train
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
)

import hf_lowrank
from hf_lowrank import LowRankOptimizer, param_groups
from hf_lowrank.observe.describe import summary
from hf_lowrank.planning import memory, targets


METHOD = "galore_i3s_adamw"
SCALE = "embedding_rule=column_norm,head_rule=momentum_column_norm"


def members(groups, kind):
    return {name for group in groups if group.get("kind") == kind for name in group["param_names"]}


def rates(groups):
    return {group.get("kind", "matrix"): group.get("lr") for group in groups}


def llama(**overrides):
    return tiny_llama(**{"tie_word_embeddings": False, **overrides})


def bert():
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**small, intermediate_size=24, num_labels=2))


def roberta():
    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return RobertaForSequenceClassification(RobertaConfig(**small, intermediate_size=24, num_labels=2))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.conv = nn.Embedding(9, 12), nn.Conv1d(12, 12, 3)
        self.linear, self.head = nn.Linear(12, 12), nn.Linear(12, 9)


EMBEDDINGS = {
    llama: {"model.embed_tokens.weight"},
    bert: {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
    roberta: {f"roberta.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
    gpt2: {"transformer.wte.weight", "transformer.wpe.weight"},
    Plain: {"table.weight"},
}
HEADS = {
    llama: {"lm_head.weight"},
    bert: {"classifier.weight"},
    roberta: {"classifier.dense.weight", "classifier.out_proj.weight"},
    gpt2: set(),
    Plain: {"head.weight"},
}


# ---- which they are -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [METHOD, None])
@pytest.mark.parametrize("make", EMBEDDINGS)
def test_every_parameter_is_in_one_group_and_those_of_a_kind_in_theirs(make, method):
    model = make()
    groups = param_groups(model, method=method, rank=4, weight_decay=0.1, embedding_lr=2e-3, dense="momentum")
    named = [name for group in groups for name in group["param_names"]]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    shapes = dict(model.named_parameters())
    vectors = {name for name in named if shapes[name].dim() < 2}
    assert members(groups, "embedding") == EMBEDDINGS[make] and members(groups, "head") == HEADS[make]
    assert members(groups, "vector") == vectors
    assert members(groups, "mixed") == ({"conv.weight"} if make is Plain else set())
    decays = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    plain = param_groups(make(), method=method, rank=4, weight_decay=0.1)
    assert decays == {name: group["weight_decay"] for group in plain for name in group["param_names"]}
    assert {group["dense"] for group in groups if "rank" not in group} == {"momentum"}


@pytest.mark.parametrize("method", [METHOD, None])
def test_where_nothing_is_given_the_groups_are_three(method):
    groups = param_groups(llama(), method=method, rank=4, weight_decay=0.1)
    assert [("rank" in group, group["weight_decay"]) for group in groups] == [(True, 0.1), (False, 0.1), (False, 0.0)]
    assert not any("lr" in group for group in groups)


@pytest.mark.parametrize("method", [METHOD, None])
def test_a_kind_with_a_rate_or_a_rule_has_a_group_of_its_own_and_nothing_else_has(method):
    groups = param_groups(llama(), method=method, rank=4, head_lr=3e-3, embedding_rule="column_norm")
    assert rates(groups) == {"matrix": None, "mixed": None, "embedding": None, "head": 3e-3}
    assert {g["kind"]: g["dense"] for g in groups if "kind" in g} == {
        "mixed": "same", "embedding": "column_norm", "head": "same",
    }  # fmt: skip


def test_a_rule_may_be_the_methods_own_beside_another_for_the_rest():
    groups = param_groups(llama(), method=METHOD, rank=4, dense="column_norm", head_rule="same")
    rules = {group["kind"]: group["dense"] for group in groups if "kind" in group}
    assert rules == {"embedding": "column_norm", "head": "same", "vector": "adam"}


def test_a_head_that_target_modules_names_has_a_subspace_and_no_rate():
    with pytest.raises(ValueError, match="head_lr: LlamaForCausalLM has no output head .* without a subspace"):
        param_groups(llama(), method=METHOD, rank=4, target_modules="lm_head", head_lr=1e-3)


def test_parameters_that_are_unfrozen_later_have_the_rate_and_rule_of_their_kind():
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    opt = LowRankOptimizer(param_groups(model, method=METHOD, rank=4, head_lr=3e-3, head_rule="sgd"), METHOD)
    assert "head" not in {group.get("kind") for group in opt.param_groups}
    opt.add_param_group({"params": [model.lm_head.weight]})
    assert [opt.param_groups[-1][key] for key in ("kind", "dense", "lr")] == ["head", "sgd", 3e-3]


# ---- tied -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option, other", [("head_lr", "embedding_lr"), ("head_rule", "embedding_rule")])
def test_a_tied_head_is_an_embedding_once_and_that_is_said(option, other):
    model, value = llama(tie_word_embeddings=True), {"head_lr": 1e-3, "head_rule": "sgd"}[option]
    with pytest.warns(UserWarning, match=f"{option}: the output head is the embedding's weight, .* {other} applies"):
        groups = param_groups(model, method=METHOD, rank=4, embedding_lr=2e-3, **{option: value})
    named = [name for group in groups for name in group["param_names"]]
    assert len(named) == len(set(named)) and members(groups, "embedding") == {"model.embed_tokens.weight"}
    assert members(groups, "head") == set() and rates(groups)["embedding"] == 2e-3


def test_nothing_is_said_of_a_tied_head_where_no_option_is_of_the_head(recwarn):
    param_groups(llama(tie_word_embeddings=True), method=METHOD, rank=4, embedding_lr=2e-3, dense="adam")
    assert not [one for one in recwarn if "head" in str(one.message)]


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [METHOD, None])
@pytest.mark.parametrize("option, value, what", [
    ("embedding_lr", 1e-3, "embedding"), ("head_lr", 1e-3, "output head"), ("vector_lr", 1e-3, "vector"),
    ("embedding_rule", "sgd", "embedding"), ("head_rule", "sgd", "output head"),
])  # fmt: skip
def test_an_option_that_matches_nothing_is_refused(option, value, what, method):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    with pytest.raises(ValueError, match=f"{option}: Sequential has no {what} .*leave it out"):
        param_groups(model, method=method, rank=4, **{option: value})


BAD = [
    ("embeding_lr=1", "no option 'embeding_lr'; did you mean 'embedding_lr'"),
    ("head_rul=adam", "no option 'head_rul'; did you mean 'head_rule'"),
    ("embedding_lr=-1", "embedding_lr must be a number >= 0"),
    ("vector_lr=nan", "vector_lr must be a number >= 0"),
    ("head_lr=fast", "head_lr must be a number >= 0"),
    ("dense=adm", "dense must be one of same, adam, momentum, momentum_column_norm, column_norm, sgd, got 'adm'"),
    ("head_rule=none", "head_rule must be one of same"),
    ("kind=head", "no option 'kind'"),
]


@pytest.mark.parametrize("text, message", BAD)
def test_a_bad_value_is_refused_everywhere(text, message, tmp_path):
    key, value = text.split("=")
    with pytest.raises(ValueError, match=message):
        param_groups(llama(), method=METHOD, rank=4, **{key: value})
    with pytest.raises(ValueError, match=message):
        hf_lowrank.optimizer_cls_and_kwargs(llama(), METHOD, rank=4, **{key: value})
    with pytest.raises(ValueError, match=message):
        args = arguments(tmp_path, METHOD, optim_args=f"rank=4,{text}")
        Trainer(llama(), args, train_dataset=tiny_data()).create_optimizer()


# ---- runs of Trainer ------------------------------------------------------------------------------------------------


def trained(folder, extra="", model=None, **overrides):
    options = ",".join(filter(None, ["rank=4,update_proj_gap=3", extra]))
    return train(arguments(folder, METHOD, optim_args=options, **overrides), model or llama())


def test_the_same_rates_and_rules_given_by_name_change_nothing(tmp_path):
    """Other groups, the same run: bit for bit, since nothing of fp32 weights depends on the group."""
    plain = trained(tmp_path / "a")
    named = trained(tmp_path / "b", "embedding_lr=1e-2,head_lr=0.01,vector_lr=1e-2,dense=adam,head_rule=same")
    assert len(engine(named).param_groups) > len(engine(plain).param_groups)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), named.model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["embedding", "head", "vector"])
def test_a_rate_of_zero_stops_a_kind_alone(kind, tmp_path):
    start = dict(llama().named_parameters())
    model = trained(tmp_path, f"{kind}_lr=0").model
    still = {name for name, p in model.named_parameters() if torch.equal(p, start[name])}
    found = {"embedding": EMBEDDINGS[llama], "head": HEADS[llama]}
    assert still == found.get(kind, {name for name, p in start.items() if p.dim() < 2})


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_a_schedule_scales_all_rates_alike(schedule, tmp_path):
    seen = []

    class Watch(hf_lowrank.LowRankCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    options = "rank=4,embedding_lr=3e-3,head_lr=2e-2,vector_lr=1e-3"
    args = arguments(tmp_path, METHOD, optim_args=options, lr_scheduler_type=schedule, warmup_steps=2)
    trainer = train(args, llama(), callbacks=[Watch()])
    kinds = [group.get("kind", "matrix") for group in engine(trainer).param_groups]
    assert kinds == ["matrix", "embedding", "head", "vector"]
    shares = torch.tensor(seen) / torch.tensor([1e-2, 3e-3, 2e-2, 1e-3])
    torch.testing.assert_close(shares, shares[:, :1].expand_as(shares))
    assert len(shares) == 8 and shares.max() == 1 and (schedule.startswith("constant") or shares[-1, 0] < 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(dtype, tmp_path):
    options = f"{SCALE},head_lr=3e-3,embedding_lr=2e-3"
    whole = trained(tmp_path / "whole", options, llama(dtype=dtype), save_strategy="steps", save_steps=1)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    args = arguments(tmp_path / "again", METHOD, optim_args=f"rank=4,update_proj_gap=3,{options}")
    resumed = train(args, llama(dtype=dtype), resume=str(tmp_path / "again" / "checkpoint-3"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def stepped(model, **options):
    cls, keywords = hf_lowrank.optimizer_cls_and_kwargs(model, METHOD, rank=4, **options)
    opt = cls(**keywords)
    model(input_ids=torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)).loss.backward()
    opt.step()
    return opt


def test_a_checkpoint_of_before_loads_where_nothing_is_given():
    opt = stepped(llama())
    old = opt.state_dict()
    for group in old["param_groups"]:
        group.pop("dense", None), group.pop("kind", None)
    other = stepped(llama())
    other.load_state_dict(old)
    assert [group.get("dense") for group in other.param_groups] == [None, "same", "same"]
    for p, q in zip(*([p for g in one.param_groups for p in g["params"]] for one in (opt, other)), strict=True):
        assert all(torch.equal(opt.state[p][key], other.state[q][key]) for key in opt.state[p])


def test_a_checkpoint_of_other_groups_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="or other kinds of parameters with a rate or rule of their own"):
        stepped(llama(), embedding_lr=1e-3).load_state_dict(stepped(llama()).state_dict())


# ---- shown ----------------------------------------------------------------------------------------------------------


def test_the_state_that_planner_and_targets_count_is_the_one_there_is():
    options = {"embedding_rule": "column_norm", "head_rule": "momentum_column_norm"}
    opt = stepped(llama(vocab_size=320), **options)
    named = [pair for group in opt.param_groups for pair in zip(group["param_names"], group["params"], strict=True)]
    held = {name: sum(x.numel() * x.element_size() for x in opt.state[p].values()) for name, p in named}
    assert held["model.embed_tokens.weight"] == 3 * 8  # counters
    assert held["lm_head.weight"] == 4 * 320 * 16 + 3 * 8
    estimate = memory.estimate_memory(llama(vocab_size=320), METHOD, rank=4, dtype="fp32", options=options)
    assert estimate.state == sum(held.values()) == opt.declared_bytes()
    rows = {row.name: row for row in targets.plan(llama(vocab_size=320), METHOD, rank=4, **options)}
    assert rows["lm_head"].state_bytes == held["lm_head.weight"] and rows["model.embed_tokens"].state_bytes == 24
    assert (rows["lm_head"].rule, rows["model.norm"].rule) == ("momentum_column_norm", "same")


def test_the_summary_names_the_kinds_that_differ():
    opt = LowRankOptimizer(
        param_groups(llama(), method=METHOD, rank=4, embedding_lr=2e-3, head_rule="momentum_column_norm"), lr=1e-2
    )
    assert "7 dense parameters, lr 0.01 (embedding lr 0.002; head by momentum_column_norm); state" in summary(opt)
    assert "7 dense parameters, lr 0.01; state" in summary(LowRankOptimizer(param_groups(llama(), rank=4), lr=1e-2))
