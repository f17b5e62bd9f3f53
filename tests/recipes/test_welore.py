"""WeLore's rule on spectra that are known, and on a tiny model."""

import pytest
import torch
from tiny_llama import TOKENS, options_of, tiny
from torch import nn
from transformers import TrainingArguments

from recipes.shared.baselines import adapter_parameters, prepare_
from recipes.shared.baselines.factorized import FactorizedLinear
from recipes.shared.baselines.welore import ranks


def prepared(model, **options):
    prepare_(model, options_of("welore", **options), TrainingArguments("unused", use_cpu=True), also_train="lm_head")
    return model


def test_ranks_are_counted_by_hand():
    spectra = {"a": torch.tensor([10.0, 2.0, 1.0, 0.0]), "b": torch.tensor([5.0, 4.5, 4.0, 3.0])}
    # scaled: a 1, .2, .1, 0; b 1, .75, .5, 0. Of these eight, 0, 0, .1 and .2 are the half
    assert ranks(spectra, 0.5) == {"a": 1, "b": 3}
    assert ranks(spectra, 0.625) == {"a": 1, "b": 2}
    assert ranks(spectra, 0.0) == {"a": 4, "b": 4}  # nothing is pruned


def test_the_reduction_is_hit_over_the_model():
    gen = torch.Generator().manual_seed(0)
    spectra = {str(i): torch.linalg.svdvals(torch.randn(20 + i, 40, generator=gen)) for i in range(8)}
    total = sum(map(len, spectra.values()))
    for reduction in (0.1, 0.5, 0.7):
        pruned = total - sum(ranks(spectra, reduction).values())
        assert abs(pruned / total - reduction) <= 1 / total


@torch.no_grad()
def test_matrices_of_low_rank_train_as_factors_and_the_model_computes_the_same():
    model = tiny().eval()
    low = {f"model.layers.{i}.mlp.{kind}_proj" for i in (0, 1) for kind in ("up", "down")}
    for name in low:
        weight = model.get_parameter(f"{name}.weight")
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(0.1 * (U[:, :3] * torch.tensor([3.0, 2.5, 2.0])) @ Vh[:3])  # rank 3 of 16
    before = model(TOKENS[:4]).logits
    # 13 of 16 values of four of fourteen matrices are 0, as is by its scale the least of each of the other ten
    prepared(model, welore_reduction=(4 * 13 + 10) / (14 * 16) + 1e-3)
    replaced = {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}
    assert replaced.keys() == low
    assert all(module.down_factor.out_features == 3 for module in replaced.values())
    # fp32: each logit is a sum of about a hundred rounded products through two layers
    torch.testing.assert_close(model(TOKENS[:4]).logits, before, atol=1e-5 * before.abs().max().item(), rtol=0)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {*adapter_parameters(model), "lm_head.weight"} and len(trainable) == 9


def test_what_keeps_its_rank_freezes_even_where_all_else_trains():
    model = tiny()
    nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    prepare_(model, options_of("welore", welore_reduction=0.5), TrainingArguments("unused", use_cpu=True))
    dense = [m for n, m in model.named_modules() if n.endswith("_proj") and isinstance(m, nn.Linear)]
    assert dense and not any(p.requires_grad for module in dense for p in module.parameters())
    assert model.model.norm.weight.requires_grad and model.model.layers[0].mlp.up_proj.down_factor.weight.requires_grad


@pytest.mark.parametrize(
    ("reduction", "words"),
    [
        (0.0, "must be above 0 and below 1, not 0"),
        (1.0, "must be above"),
        (0.01, "more than half of its rank to every"),
    ],
)
def test_errors_say_what_to_do(reduction, words):
    with pytest.raises(ValueError, match=words):
        prepared(tiny(), welore_reduction=reduction)
