"""QLoRA on a tiny classifier: what is quantized, what moves; names of bitsandbytes and torchao."""

import sys

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from tiny_llama import options_of, tiny, trained
from transformers import (
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.utils import is_torchao_available

from recipes.shared.baselines import adapter_parameters, loading_kwargs, prepare_, to_plain_


def arguments(**options):
    return TrainingArguments("unused", use_cpu=True, **options)


@pytest.fixture
def classifier(tmp_path):
    config = tiny().config
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    return AutoModelForSequenceClassification.from_pretrained(
        tmp_path, **loading_kwargs(options_of("qlora"), arguments())
    )


def test_the_base_is_in_4_bits_and_the_head_trains(classifier):
    prepare_(classifier, options_of("qlora", adapter_targets="q_proj,v_proj"), arguments(), also_train="score")
    packed = {name for name, module in classifier.named_modules() if isinstance(module, Linear4bit)}
    assert (
        len({name.removesuffix(".base_layer") for name in packed if "proj" in name}) == 14
    )  # all matrices, adapted or not
    assert type(classifier.score) is torch.nn.Linear
    trainable = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert trainable == {*adapter_parameters(classifier), "score.weight"} and len(trainable) == 9


def test_a_head_of_several_layers_is_not_quantized(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    RobertaForSequenceClassification(RobertaConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    kwargs = loading_kwargs(options_of("qlora"), arguments())
    model = RobertaForSequenceClassification.from_pretrained(tmp_path, **kwargs)
    assert isinstance(model.roberta.encoder.layer[0].output.dense, Linear4bit)
    assert type(model.classifier.dense) is type(model.classifier.out_proj) is torch.nn.Linear


def test_the_base_does_not_move_and_merges_as_it_is(tmp_path):
    model = trained(tmp_path, "qlora", steps=4).model
    fresh = trained(tmp_path / "other", "qlora", steps=1).model
    name = "model.layers.0.mlp.down_proj"
    layer, other = model.get_submodule(name), fresh.get_submodule(name)
    assert torch.equal(layer.base_layer.weight, other.base_layer.weight)  # bit for bit
    base = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state)
    expected = base + 16.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight  # alpha 32 over rank 2
    to_plain_(model)
    torch.testing.assert_close(model.get_submodule(name).weight, expected, atol=1e-6, rtol=0)  # fp32 weights below 1
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    assert "quantization_config" not in model.config.to_dict()


@pytest.mark.parametrize(
    ("baseline", "optim", "bits"),
    [
        ("paged_adamw", "adamw_torch", 32),
        ("paged_adamw_8bit", "galore_i3s_adamw", 8),
        ("qlora", "galore_i3s_adamw", 32),
    ],
)
def test_paged_names_are_values_of_optim(baseline, optim, bits, tmp_path):
    optimizer = trained(tmp_path, baseline, steps=2, optim=optim).optimizer.optimizer
    assert optimizer.is_paged and optimizer.args.optim_bits == bits


@pytest.mark.skipif(is_torchao_available(), reason="says what to install where it is not")
def test_without_torchao_a_sentence_says_what_to_install():
    args = arguments()
    prepare_(tiny(), options_of("adamw_4bit"), args)
    with pytest.raises(ImportError, match="pip install torchao"):
        Trainer.get_optimizer_cls_and_kwargs(args, tiny())


def test_a_machine_without_4_bits_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)  # cannot be imported
    with pytest.raises(
        ValueError, match="--baseline qlora needs bitsandbytes with 4-bit weights on cpu, which failed"
    ):
        loading_kwargs(options_of("qlora"), arguments())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"baseline": "qlora"}, "wants a model that was loaded in 4 bits"),
        ({"baseline": "sparse", "adapter_rank": 9}, "asks for 288 entries of model.layers.0.self_attn.q_proj, which"),
        ({"baseline": "lora", "adapter_kind": "velora", "velora_groups": 0}, "--velora_groups must be at least 1"),
    ],
)
def test_errors_say_what_to_do(options, words):
    with pytest.raises(ValueError, match=words):
        prepare_(tiny(), options_of(**options), arguments())


def test_an_adapter_that_does_not_merge_into_4_bits_is_refused(classifier):
    with pytest.raises(ValueError, match="--adapter_kind lora or rslora, not dora"):
        prepare_(classifier, options_of("qlora", adapter_kind="dora"), arguments())
