"""Which parameters get a subspace, on the architectures that people train."""

import pytest
import torch
from conftest import tiny_llama
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    SwinConfig,
    SwinForImageClassification,
)

from hf_lowrank import LowRankOptimizer, param_groups, target_parameters


def kinds(names):
    return {name.removesuffix(".weight").split(".")[-1] for name in names}


def step_once(model, groups, **inputs):
    optimizer = LowRankOptimizer(groups, "fira_i3s_adamw", lr=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    model(**inputs).loss.backward()
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert any(changed)
    return optimizer


def test_llama_with_grouped_queries():
    names = target_parameters(tiny_llama(), rank=4)
    assert kinds(names) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 14


def test_a_short_side_at_or_below_the_rank_stays_dense():
    names = target_parameters(tiny_llama(), rank=8)  # k and v have 8 rows
    assert kinds(names) == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(ValueError, match="rank=16 is not below the short side of any matrix .the largest is 16."):
        target_parameters(tiny_llama(), rank=16)


@pytest.mark.parametrize("method", ["full_adamw", "alice_adamw"])
def test_of_a_model_of_rows_and_columns_no_smaller_rank_is_asked_for(method):
    net = torch.nn.Sequential(torch.nn.Linear(8, 1), torch.nn.Linear(1, 8))
    with pytest.raises(ValueError, match="every matrix of Sequential is one row or one column"):
        param_groups(net, method=method)


def test_a_fraction_of_the_short_side_takes_all():
    assert len(target_parameters(tiny_llama(), rank=0.25)) == 14


def test_gpt2_has_conv1d_and_a_tied_head():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    groups = param_groups(model, rank=4)
    names = [name for group in groups if "rank" in group for name in group["param_names"]]
    assert kinds(names) == {"c_attn", "c_proj", "c_fc"} and len(names) == 4
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))
    ids = torch.randint(0, 32, (2, 8))
    step_once(model, groups, input_ids=ids, labels=ids)


def test_roberta_keeps_its_classification_head_dense():
    config = RobertaConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=2
    )
    model = RobertaForSequenceClassification(config)
    names = target_parameters(model, rank=4)
    assert len(names) == 6 and not any("classifier" in name for name in names)
    explicit = ["query", "key", "value", "intermediate.dense", "output.dense"]  # the papers' GLUE targets
    assert set(target_parameters(model, rank=4, target_modules=explicit)) == set(names)


def test_experts_are_stacks_of_matrices():
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=1,
    )
    model = MixtralForCausalLM(config)
    groups = param_groups(model, rank=4)
    taken = {
        name: p
        for group in groups
        if "rank" in group
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    experts = [p for name, p in taken.items() if "experts" in name]
    assert experts and all(min(p.shape[-2:]) > 4 for p in experts)
    ids = torch.randint(0, 32, (2, 8))
    optimizer = step_once(model, groups, input_ids=ids, labels=ids)
    for p in experts:
        P = optimizer.state[p]["basis"]
        assert P.dim() == p.dim()
        torch.testing.assert_close(P.mT @ P, torch.eye(4).expand(*P.shape[:-2], 4, 4), atol=1e-5, rtol=0)


def test_a_stack_of_experts_outside_transformers():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(3, 16, 24))
            self.down_proj = nn.Parameter(torch.randn(3, 24, 16))
            self.position = nn.Conv1d(4, 4, 3)

    assert target_parameters(Experts(), rank=4) == ["gate_up_proj", "down_proj"]


def test_tied_embeddings_stay_dense():
    names = target_parameters(tiny_llama(tie_word_embeddings=True), rank=4)
    assert len(names) == 14

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(32, 16)
            self.inner = nn.Linear(16, 16)
            self.out = nn.Linear(16, 32, bias=False)
            self.out.weight = self.embed.weight

    assert target_parameters(Tied(), rank=4) == ["inner.weight"]


def test_heads_of_plain_models_stay_dense():
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("body", "lm_head", "classifier", "score", "head")})
    assert target_parameters(model, rank=4) == ["body.weight"]
    assert target_parameters(model, rank=4, target_modules="score") == ["score.weight"]  # unless asked for


def test_frozen_parameters_are_in_no_group():
    model = tiny_llama()
    model.model.layers[0].requires_grad_(False)
    groups = param_groups(model, rank=4)
    members = {id(p) for group in groups for p in group["params"]}
    assert members == {id(p) for p in model.parameters() if p.requires_grad}


def test_lora_factors_are_never_projected():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(tiny_llama(), config)
    with pytest.raises(ValueError, match="LoRA factor"):
        target_parameters(adapted, rank=4)
    for name, p in adapted.named_parameters():  # train the up projections in full, beside the adapters
        if "up_proj" in name:
            p.requires_grad_(True)
    assert kinds(target_parameters(adapted, rank=4)) == {"up_proj"}


def test_wrappers_do_not_change_the_names():
    model = tiny_llama()
    plain = target_parameters(model, rank=4)
    assert target_parameters(torch.compile(model), rank=4) == plain
    assert target_parameters(nn.DataParallel(model), rank=4) == plain
    assert target_parameters(nn.DataParallel(torch.compile(model)), rank=4) == plain


@pytest.mark.parametrize("name", ["inner", "module"])
def test_a_child_that_is_called_module_is_no_wrapper(name):
    """Where there is something beside it: other modules, or parameters of its own."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32))
            setattr(self, name, nn.Linear(32, 64, bias=False))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, name, nn.Linear(32, 64))
            self.scaled, self.out = Scaled(), nn.Linear(64, 32)

    assert target_parameters(Net(), rank=4) == [f"{name}.weight", f"scaled.{name}.weight", "out.weight"]
    names = [name for group in param_groups(Net(), rank=4) for name in group["param_names"]]
    assert sorted(names) == sorted(n for n, _ in Net().named_parameters())


def test_a_wrapper_may_have_a_loss_beside_what_it_wraps():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module, self.loss = inner, nn.CrossEntropyLoss()

    model = tiny_llama()
    assert target_parameters(Wrapper(model), rank=4) == target_parameters(model, rank=4)


def test_a_part_of_a_model_that_is_split_later_changes_no_name_of_its_run():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 24, bias=False)

    net = Block()
    net.block = Block()
    optimizer = LowRankOptimizer(param_groups(net, rank=4), "galore_random_adamw")
    before = [one.name for one in optimizer.declared()]
    param_groups(net.block, rank=4)
    assert [one.name for one in optimizer.declared()] == before == ["fc.weight", "block.fc.weight"]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*(optimizer.state[p]["basis"] for p in net.parameters()))  # each draws from its own stream


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        ("all-linear", 14),
        ("q_proj,v_proj", 4),
        ("q_proj", 2),
        (["q_proj", "mlp"], 8),
        (r"model\.layers\.0\..*", 7),
        (r".*\.[qk]_proj", 4),
        (r".*\.(q|k){1,2}_proj", 4),
    ],
)
def test_patterns(patterns, count):
    assert len(target_parameters(tiny_llama(), rank=4, target_modules=patterns)) == count


def test_an_explicit_target_is_clamped_and_projected():
    model = tiny_llama()
    groups = param_groups(model, rank=64, target_modules="k_proj")
    ids = torch.randint(0, 32, (2, 8))
    optimizer = step_once(model, groups, input_ids=ids, labels=ids)
    assert optimizer.state[model.model.layers[0].self_attn.k_proj.weight]["basis"].shape == (8, 8)


@pytest.mark.parametrize("patterns", ["q_porj", ["q_proj", "nothing"], "embed_tokens", "input_layernorm"])
def test_a_pattern_without_a_match_is_an_error_that_suggests(patterns):
    with pytest.raises(ValueError, match="matches no trainable matrix") as error:
        target_parameters(tiny_llama(), rank=4, target_modules=patterns)
    if patterns == "q_porj":
        assert "did you mean 'q_proj'?" in str(error.value) and "down_proj" in str(error.value)


def test_nothing_to_project_is_an_error():
    with pytest.raises(ValueError, match="no trainable nn.Linear"):
        target_parameters(nn.Conv2d(4, 4, 3), rank=4)


def test_a_model_whose_stages_have_other_numbers_of_heads():
    """Swin's config has a list where others have the number of heads: a fact that is not known."""
    sizes = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [1, 2],
        "window_size": 4,
    }
    model = SwinForImageClassification(SwinConfig(**sizes))
    groups = param_groups(model, method="galore_dominant_adam_mini", rank=4)
    assert any(name.endswith("query.weight") or name.endswith("q_proj.weight") for name in groups[0]["param_names"])
    assert groups[0]["head_dim"] == 0
