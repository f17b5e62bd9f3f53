"""What every baseline that changes the model must do: start, count, resume and merge as it should."""

import re
import shutil
from math import isqrt
from pathlib import Path

import pytest
import torch
from tiny_llama import CONFIG, TOKENS, loaded, options_of, tiny, trained
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, TrainingArguments

from recipes.shared import baselines
from recipes.shared.baselines import BASELINES, adapter_parameters, prepare_, to_plain_


RANK = 2
WIDTH, INNER, LAYERS = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_hidden_layers
SHAPES = LAYERS * (4 * [(WIDTH, WIDTH)] + 2 * [(INNER, WIDTH)] + [(WIDTH, INNER)])
"""(out, in) of the matrices of the body."""


def lora(m, n):
    return RANK * (m + n)


def sltrain(m, n):
    return RANK * (m + n) + int(0.03 * m * n)


def mora(m, n):
    return (isqrt(RANK * (m + n)) // 2 * 2) ** 2  # type 6, and by luck of these shapes the same for type 1


PARAMETERS = {name: lora for name in ("lora", "relora", "cola", "plora", "low_rank", "sparse", "qlora")}
PARAMETERS |= {"sltrain": sltrain, "mora": mora, "remora": mora}
"""Trainable numbers in the place of a matrix (out, in), by the papers' formulas."""

OTHERS = {"low_rank", "sltrain", "welore"}
"""Those that do not start as the model they were given: a matrix of low rank is another one."""

ADAPTED = sorted(name for name in BASELINES if BASELINES[name].adapt_)


def prepared(baseline, **options):
    arguments, training_args = options_of(baseline, **options), TrainingArguments("unused", use_cpu=True)
    model = loaded(arguments, training_args).eval()
    prepare_(model, arguments, training_args)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS[:4]).logits


def close(found, expected):
    # fp32: each logit is a sum of about a hundred rounded products through two layers
    torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("baseline", ADAPTED)
def test_it_starts_as_the_model_where_the_paper_says_so(baseline):
    start, plain = logits(prepared(baseline)), logits(tiny())
    if baseline in OTHERS:
        assert (start - plain).abs().max() > 1e-3 * plain.abs().max()
    elif baseline == "qlora":  # as its 4-bit weights: a weight is off by a tenth of the largest of its block at most
        assert 0 < (start - plain).abs().max() < 0.2 * plain.abs().max()
    else:
        close(start, plain)


@pytest.mark.parametrize("baseline", PARAMETERS)
def test_it_trains_as_many_numbers_as_the_formula_says(baseline):
    model = prepared(baseline)
    factors = adapter_parameters(model)
    assert sum(model.get_parameter(name).numel() for name in factors) == sum(PARAMETERS[baseline](*s) for s in SHAPES)
    beside = {name for name, p in model.named_parameters() if p.requires_grad} - set(factors)
    dense = {name for name, _ in tiny().named_parameters() if "proj" not in name}
    assert beside == dense  # embeddings, norms and head


@pytest.mark.parametrize("baseline", ADAPTED)
def test_merged_it_is_an_ordinary_model_that_computes_the_same(tmp_path, baseline):
    model = trained(tmp_path, baseline, steps=3).model
    start, before = logits(prepared(baseline)), logits(model)
    assert (before - start).abs().max() > 1e-2 * start.abs().max()  # it learned something
    to_plain_(model)
    model.save_pretrained(tmp_path / "plain")
    assert set(model.state_dict()) == set(LlamaForCausalLM(CONFIG).state_dict())
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")), before)


@pytest.mark.parametrize("baseline", ADAPTED)
def test_resumed_equals_uninterrupted(tmp_path, baseline):
    """At a merge, one step after it, and in between: weights, adapters and the log are the same bit for bit."""
    whole = trained(tmp_path, baseline)
    expected = {name: p.clone() for name, p in whole.model.state_dict().items()}
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    for cut in (2, 3):
        shutil.rmtree(tmp_path / "checkpoint-6")
        resumed = trained(tmp_path, baseline, resume=str(tmp_path / f"checkpoint-{cut}"))
        found = resumed.model.state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses


def test_the_page_names_every_baseline():
    table = (Path(baselines.__file__).parents[1] / "README.md").read_text().split("## Delta-LoRA")[0]
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall("`(.*?)`", row)} == BASELINES.keys()
    for line in table.splitlines():
        for name in re.findall("`(.*?)`", line.split(" | ")[0]) if line.startswith("| `") else ():
            assert line.rstrip(" |").endswith(BASELINES[name].only_for or "both"), name


@pytest.mark.parametrize("baseline", ["low_rank", "sltrain", "mora"])
def test_what_replaces_linear_layers_says_so_where_there_are_none(baseline):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    with pytest.raises(ValueError, match=f"--baseline {baseline} replaces nn.Linear alone; transformer.h.0.*Conv1D"):
        prepare_(model, options_of(baseline), TrainingArguments("unused", use_cpu=True))
