"""A resumed run goes on from every weight that was trained, also where checkpoints name them otherwise than the model
does; where a checkpoint cannot have them all, that is said."""

import shutil

import pytest
import torch
import transformers
from conftest import arguments, engine, tiny_data, tiny_llama, train
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer

from hf_lowrank import LowRankTrainer
from hf_lowrank.hf import weights


NAME = "galore_i3s_adamw"
SAVING = {"save_strategy": "steps", "save_steps": 1}
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4}


RENAMES = pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="names are those of the model before transformers 5"
)


def renamed(kind, dtype=torch.float32):
    """A model whose checkpoints have other names than it: of all experts, or of the output head."""
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**SIZES, **EXPERTS)
        return transformers.MixtralForCausalLM(config).to(dtype)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)).to(dtype)


def same(a, b):
    pairs = zip(a.model.state_dict().items(), b.model.state_dict().items(), strict=True)
    return all(m == n and torch.equal(p, q) for (m, p), (n, q) in pairs)


@pytest.mark.parametrize("base", [Trainer, LowRankTrainer])
@pytest.mark.parametrize(
    "kind, dtype", [("mixtral", torch.bfloat16), ("mixtral", torch.float32), ("neox", torch.float32)]
)
def test_models_whose_files_have_other_names_resume_bit_for_bit(kind, dtype, base, tmp_path):
    args = {"max_steps": 5, "logging_steps": 5}
    whole = train(arguments(tmp_path / "whole", NAME, **SAVING, **args), renamed(kind, dtype), base)
    path = tmp_path / "whole" / "checkpoint-3"
    resumed = train(arguments(tmp_path / "rest", NAME, **args), renamed(kind, dtype), base, resume=str(path))
    assert same(whole, resumed)


@pytest.mark.parametrize("base", [Trainer, LowRankTrainer])
def test_of_such_a_model_the_best_one_is_loaded_at_the_end(base, tmp_path):
    saving = {**SAVING, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    highest = {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # of a loss that falls: the first
    args = arguments(tmp_path, NAME, max_steps=4, **saving, **highest)
    trainer = train(args, renamed("mixtral"), base, eval_dataset=tiny_data(8))
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best = transformers.MixtralForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(best[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(tmp_path):
    train(arguments(tmp_path, NAME, **SAVING, max_steps=2))
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    held = load_file(file)
    held.pop("model.layers.1.mlp.up_proj.weight")
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"checkpoint-2 has not all weights of this LlamaForCausalLM: .*1\.mlp\.up_proj"
    ):
        train(arguments(tmp_path, NAME, max_steps=4), resume=str(file.parent))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_whose_names_are_kept_is_read_once(tied, tmp_path, monkeypatch):
    """Also where the head, which is the embedding, is in no file."""
    train(arguments(tmp_path, NAME, **SAVING, max_steps=2), tiny_llama(tie_word_embeddings=tied))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", None)
    path = tmp_path / "checkpoint-2"
    model = tiny_llama(tie_word_embeddings=tied)
    assert ("lm_head.weight" in weights.names_in(path)) is not tied and weights.absent(
        model, weights.names_in(path)
    ) == []
    train(arguments(tmp_path, NAME, max_steps=3), model, resume=str(path))


@RENAMES
def test_weights_that_are_in_several_files_are_known_by_their_index(tmp_path):
    model = renamed("mixtral")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert weights.names_in(tmp_path / "one") == weights.names_in(tmp_path / "many")
    other = renamed("mixtral")
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    weights.read_rest_(other, tmp_path / "many")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@RENAMES
@pytest.mark.parametrize("kind", ["vit", "qwen"])
def test_other_architectures_are_read_too(kind, tmp_path):
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    if kind == "vit":
        config, of = (
            transformers.ViTConfig(image_size=8, patch_size=4, **sizes),
            transformers.ViTForImageClassification,
        )
    else:
        config, of = transformers.Qwen2MoeConfig(**SIZES, **experts), transformers.Qwen2MoeForCausalLM
    model, other = of(config), of(config)
    model.save_pretrained(tmp_path)
    weights.read_rest_(other, tmp_path)
    rest = weights.absent(model, weights.names_in(tmp_path))
    assert rest and all(torch.equal(model.state_dict()[name], other.state_dict()[name]) for name in rest)


def test_reading_them_moves_no_generator(tmp_path):
    model = renamed("mixtral")
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    weights.read_rest_(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def adapted(**more):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], **more))
    for name, p in model.named_parameters():
        if "down_proj" in name and not more:
            p.requires_grad_(True)
    return model


def test_weights_that_peft_does_not_save_are_named_and_such_a_run_is_not_resumed(tmp_path, caplog):
    train(arguments(tmp_path, NAME, **SAVING, max_steps=2), adapted())
    said = "2 other parameters are trained too (base_model.model.model.layers.0.mlp.down_proj.weight"
    assert said in caplog.text
    with pytest.raises(
        ValueError, match=r"cannot resume: checkpoints of a peft model hold .*modules_to_save, or train"
    ):
        train(arguments(tmp_path, NAME, max_steps=4), adapted(), resume=str(tmp_path / "checkpoint-2"))


def test_with_modules_to_save_a_peft_model_resumes_bit_for_bit(tmp_path, caplog):
    saved = {"modules_to_save": ["down_proj"]}
    whole = train(arguments(tmp_path / "whole", NAME, **SAVING, max_steps=5), adapted(**saved))
    assert "are trained too" not in caplog.text
    shutil.copytree(tmp_path / "whole", tmp_path / "rest")
    path = str(tmp_path / "rest" / "checkpoint-3")
    resumed = train(arguments(tmp_path / "rest", NAME, max_steps=5), adapted(**saved), resume=path)
    assert same(whole, resumed) and len(engine(resumed).state) == len(engine(whole).state)
