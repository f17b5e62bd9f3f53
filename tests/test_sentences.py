"""Mistakes that end in a sentence, and what a compiler does with a step."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from hf_lowrank import LowRankOptimizer, param_groups
from hf_lowrank.methods.options import split_assignments


NAME = "galore_dominant_adamw"


def matrix(device="cpu"):
    return nn.Parameter(torch.ones(8, 6, device=device))


def stepped(p, **options):
    optimizer = LowRankOptimizer([{"params": [p], **options}], NAME)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("where", ["constructor", "group"])
def test_a_method_must_be_a_name(where):
    group = {"params": [matrix()], "rank": 2, **({"method": None} if where == "group" else {})}
    with pytest.raises(ValueError, match="method must be a name such as"):
        LowRankOptimizer([group], None if where == "constructor" else NAME)


def test_a_group_needs_parameters():
    with pytest.raises(ValueError, match="needs its parameters under 'params'; this one has rank"):
        LowRankOptimizer([{"rank": 2}], NAME)


def test_parameters_on_the_meta_device_are_not_stepped_but_their_memory_is_known():
    optimizer = LowRankOptimizer([{"params": [matrix("meta")], "rank": 2}], NAME)
    assert optimizer.declared_bytes() > 0
    with pytest.raises(ValueError, match=r"of shape \(8, 6\) is on the meta device"):
        optimizer.step()


@pytest.mark.parametrize("options", [{"rank": 2}, {}], ids=["low-rank", "dense"])
def test_a_weight_that_changed_its_shape_is_refused(options):
    p = matrix()
    optimizer = stepped(p, **options)
    p.grad = None
    p.data = torch.ones(4, 6)
    p.grad = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"of shape \(8, 6\) has become one of shape \(4, 6\)"):
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 6))


def test_a_weight_that_became_one_of_a_type_that_is_not_trained_is_refused_before_anything_is_stepped():
    w, b = matrix(), nn.Parameter(torch.ones(4))
    optimizer = LowRankOptimizer([{"params": [w], "rank": 2}, {"params": [b]}], NAME)
    for p in (w, b):
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in (w, b):
        p.grad = None
        p.data = p.data.double()
        p.grad = torch.ones_like(p)
    before = w.clone()
    with pytest.raises(ValueError, match="a parameter has become torch.float64; train it in float32"):
        optimizer.step()
    assert torch.equal(w, before)


@pytest.mark.parametrize("method", [None, NAME])
@pytest.mark.parametrize("key, value", [("lr", 1e-2), ("betas", (0.8, 0.99)), ("eps", 1e-6)])
def test_what_is_of_all_groups_is_not_given_to_some(key, value, method):
    """Else it would be the matrices' alone."""
    net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=f"param_groups takes no {key}: give it to LowRankOptimizer"):
        param_groups(net, method=method, rank=2, **{key: value})


def test_a_flat_partition_in_the_place_of_a_matrix_is_told_so():
    flat = nn.Parameter(torch.ones(48))
    sentence = r"has shape \(48,\); only matrices .*DeepSpeed's ZeRO flatten parameters: use FSDP2 or DDP"
    with pytest.raises(ValueError, match=sentence):
        LowRankOptimizer([{"params": [flat], "rank": 2}], NAME)
    optimizer = LowRankOptimizer([{"params": [matrix()], "rank": 2}], NAME)
    optimizer.param_groups[0]["params"] = [flat]  # as ZeRO does with the optimizer that it is given
    flat.grad = torch.ones(48)
    with pytest.raises(ValueError, match=sentence):
        optimizer.step()
    assert torch.equal(flat, torch.ones(48))


class OnlyAHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(16, 16)


def test_a_model_of_one_head_is_told_so():
    with pytest.raises(ValueError, match=r"outside the model's body \(classifier\): output heads stay dense"):
        param_groups(OnlyAHead(), method=NAME, rank=4)
    assert param_groups(OnlyAHead(), method=NAME, rank=4, target_modules="classifier")[0]["rank"] == 4


def test_lora_with_a_trained_head_is_told_so():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30
    )
    lora = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    model = peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)
    with pytest.raises(ValueError, match=r"beside LoRA factors.*\(.*classifier.*\)"):
        param_groups(model, method=NAME, rank=4)


def test_a_compiled_step_is_the_step():
    p, q = matrix(), matrix()
    mine, theirs = stepped(p, rank=2), stepped(q, rank=2)
    torch.compile(mine.step, backend="eager")()
    theirs.step()
    assert torch.equal(p, q) and int(mine.state[p]["step"]) == 2


def test_a_weight_may_change_its_shape_where_its_state_is_dropped():
    p = matrix()
    optimizer = stepped(p, rank=2)
    optimizer.state.clear()
    p.grad = None
    p.data = torch.ones(4, 6)
    p.grad = torch.ones(4, 6)
    optimizer.step()
    assert not torch.equal(p, torch.ones(4, 6))


@pytest.mark.parametrize("value", ["1e-3", True, None, float("nan")])
def test_a_learning_rate_is_a_number(value):
    with pytest.raises(ValueError, match=r"lr must be a number in \[0, inf\), got"):
        LowRankOptimizer([matrix()], NAME, lr=value)


def test_groups_come_from_a_module():
    with pytest.raises(ValueError, match=r"give the nn.Module, not list"):
        param_groups([matrix()], method=NAME, rank=2)


@pytest.mark.parametrize(("targets", "message"), [
    ([], "optim_target_modules is empty"),
    (" , ", "optim_target_modules is empty"),
    (True, "is an expression, or a list of them, not True"),
    ([1], "is an expression, or a list of them, not"),
])  # fmt: skip
def test_targets_are_expressions(targets, message):
    with pytest.raises(ValueError, match=message):
        param_groups(nn.Sequential(nn.Linear(8, 8)), method=NAME, rank=2, target_modules=targets)


def test_the_default_targets_may_stand_beside_others():
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "classifier": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    groups = param_groups(net, method=NAME, rank=2, target_modules=["all-linear", "classifier"])
    assert groups[0]["param_names"] == ["a.weight", "classifier.weight", "b.weight"]


def test_a_model_without_matrices_is_sent_elsewhere():
    with pytest.raises(ValueError, match="LayerNorm has no trainable .* another optimizer, such as adamw_torch"):
        param_groups(nn.LayerNorm(8), method=NAME, rank=2)


@pytest.mark.parametrize("given", [{"rank": 4}, ["rank=4"], 4])
def test_options_in_one_string_are_text(given):
    with pytest.raises(ValueError, match="optim_args is text such as"):
        split_assignments(given)


def test_a_comma_within_brackets_separates_nothing():
    found = split_assignments("rank=4, betas=(0.9, 0.95),order=[3,1],scale=2")
    assert found == {"rank": "4", "betas": "(0.9, 0.95)", "order": "[3,1]", "scale": "2"}
    with pytest.raises(ValueError, match=r"'0.95\)' is not of the form option=value"):
        split_assignments("betas=0.9,0.95)")


def test_parameters_alone_are_trained_with_a_warning_that_nothing_is_projected():
    with pytest.warns(UserWarning, match="no group has a 'rank', so nothing is projected"):
        LowRankOptimizer([matrix()], NAME)


def test_groups_of_another_rank_leave_matrices_out_of_a_method_without_one():
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 8))
    with pytest.warns(UserWarning, match=r"muon_4bit has no rank, .* rank=8: 1 matrices .*method='muon_4bit'\)"):
        left_out = LowRankOptimizer(param_groups(net, rank=8), "muon_4bit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = LowRankOptimizer(param_groups(net, method="muon_4bit"), "muon_4bit")
        LowRankOptimizer(param_groups(torch.nn.Linear(16, 16), rank=8), "muon_4bit")  # leaves nothing out
    assert [len(o.param_groups[0]["params"]) for o in (left_out, told)] == [1, 2]


def test_names_and_parameters_of_a_group_go_together():
    p, q = matrix(), matrix()
    optimizer = LowRankOptimizer([{"params": [("p", p)], "rank": 2}], NAME)
    optimizer.param_groups[0]["params"].append(q)
    with pytest.raises(ValueError, match="2 parameters but 1 names: use add_param_group"):
        optimizer.step()


@pytest.mark.parametrize("value", [0.9, (0.9,), "0.9,0.99", (0.9, 1.0), None])
def test_betas_are_two_numbers(value):
    with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\), got"):
        LowRankOptimizer([matrix()], NAME, betas=value)


def test_weight_decay_may_be_given_to_the_groups_or_to_the_optimizer():
    """It used to be 0 for groups that were made without one, whatever the optimizer was told."""
    net = nn.Sequential(nn.Linear(8, 8))
    for given, told, used in ((None, 0.1, 0.1), (0.2, 0.1, 0.2), (0.0, 0.1, 0.0), (None, 0.0, 0.0)):
        groups = param_groups(net, method=NAME, rank=2, weight_decay=given)
        optimizer = LowRankOptimizer(groups, NAME, weight_decay=told)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [used, 0.0]
