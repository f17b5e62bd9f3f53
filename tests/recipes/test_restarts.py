"""COLA, PLoRA and their like: what a merge leaves as it is, schedules, and how the chain adds up."""

import pytest
import torch
from tiny_llama import TOKENS, options_of, tiny, trained
from transformers import TrainingArguments

from recipes.shared.baselines import adapter_parameters, prepare_, to_plain_
from recipes.shared.baselines.restarts import chained, merge_and_restart_


RANK = 2


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rates(trainer):
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


@pytest.mark.parametrize(("baseline", "keep"), [("lora", 0.0), ("lora", 0.3), ("lora", 1.0), ("remora", 0.0)])
def test_a_merge_leaves_what_the_model_computes(baseline, keep):
    """(1 - mu) s B A in the base and s (mu B) A beside it are s B A, for every mu; ReMoRA's types twice around."""
    model = tiny()
    prepare_(model, options_of(baseline), TrainingArguments("unused", use_cpu=True))
    model.eval()  # no dropout
    for round_ in range(3):
        gen = torch.Generator().manual_seed(round_)
        for name in adapter_parameters(model):
            p = model.get_parameter(name)
            p.data = 0.1 * torch.randn(p.shape, generator=gen)
        before = weights(model)
        with torch.no_grad():
            expected = model(TOKENS[:4]).logits
            merge_and_restart_(model, gen, keep=keep)
            found = model(TOKENS[:4]).logits
        # fp32: each entry is a sum of about a hundred rounded products through two layers
        torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
        after = weights(model)
        assert any(not torch.equal(after[name], p) for name, p in before.items()) == (keep < 1)
        if 0 < keep < 1:  # A stays, B shrinks
            name = "model.layers.0.mlp.up_proj.lora_{}.default.weight"
            assert torch.equal(after[name.format("A")], before[name.format("A")])
            assert torch.equal(after[name.format("B")], keep * before[name.format("B")])


def test_a_chain_of_one_link_is_lora(tmp_path):
    one = trained(tmp_path / "chain", "cola", cola_links=1)
    other = trained(tmp_path / "lora", "lora")
    assert losses(one) == losses(other) and rates(one) == rates(other)
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_every_link_goes_through_the_whole_schedule(tmp_path):
    found = rates(trained(tmp_path, "cola", cola_links=2, steps=8, warmup_steps=2, lr_scheduler_type="linear",
                          lr_scheduler_kwargs=None))  # fmt: skip
    # step j of a link of 4 is step 2 j of 8: the warm-up ends after one step, and then 6 steps fall by 2
    assert found == pytest.approx(2 * [1e-2 * share for share in (0.0, 1.0, 4 / 6, 2 / 6)])
    curve = chained(lambda step: 100 - step, every=4, total=10)  # 4, 4, and a link that is cut after 2
    assert [curve(step) for step in range(11)] == [100, 97.5, 95, 92.5, 100, 97.5, 95, 92.5, 100, 97.5, 90]


def test_periodic_lora_without_momentum_is_a_chain(tmp_path):
    one = trained(tmp_path / "plora", "plora", relora_every=2)
    other = trained(tmp_path / "cola", "cola", cola_links=3)
    assert losses(one) == losses(other)
    assert all(torch.equal(p, q) for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True))
    third = trained(tmp_path / "momentum", "plora", plora_momentum=0.5)
    assert losses(third)[:2] == losses(one)[:2] and losses(third)[2:] != losses(one)[2:]


@pytest.mark.parametrize(("links", "bound"), [(1, RANK), (3, 3 * RANK)])
def test_the_links_of_a_chain_add_up(tmp_path, links, bound):
    model = trained(tmp_path, "cola", cola_links=links).model
    to_plain_(model)
    name = "model.layers.0.self_attn.q_proj.weight"
    change = (model.get_parameter(name) - tiny().get_parameter(name)).detach().double()
    # fp32 weights of up to 0.1: what is below 1e-6 of the change is rounding
    assert torch.linalg.matrix_rank(change, rtol=1e-5) == bound


@pytest.mark.parametrize(
    ("options", "optim", "words"),
    [
        ({"baseline": "cola", "cola_links": 0}, "adamw_torch", "--cola_links must be at least 1, not 0"),
        ({"baseline": "plora", "plora_momentum": 1.0}, "adamw_torch", "--plora_momentum must be at least 0 and below"),
        ({"baseline": "plora", "relora_every": 0}, "adamw_torch", "--relora_every must be at least 1, not 0"),
        ({"baseline": "cola", "adapter_kind": "dora"}, "adamw_torch", "cola merges factors, and DoRA's norms"),
        ({"baseline": "relora"}, "adafactor", "cannot with --optim adafactor: choose one of adamw_torch"),
        ({"baseline": "mora", "mora_type": 3}, "adamw_torch", "--mora_type must be one of 1, 2, 6, not 3"),
    ],
)
def test_errors_say_what_to_do(options, optim, words):
    with pytest.raises(ValueError, match=words):
        prepare_(tiny(), options_of(**options), TrainingArguments("unused", use_cpu=True, optim=optim))
