"""Trainers built on Trainer (TRL's SFTTrainer, Seq2SeqTrainer), and peft models that train more than LoRA factors."""

import json

import pytest
import torch
from conftest import OPTIONS, arguments, engine, tiny_data, tiny_llama, train
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from hf_lowrank import LowRankOptimizer, LowRankTrainer, optimizer_cls_and_kwargs


OPTIM = "galore_i3s_adamw"
COMMON = {
    "optim": OPTIM,
    "optim_args": OPTIONS,
    "learning_rate": 1e-2,
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
NOUNS, VERBS = ["cat", "dog", "bird"], ["sees", "hears", "likes"]
WORDS = ["[PAD]", "[EOS]", "[UNK]", "the", "a", ".", *NOUNS, *VERBS]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


def sentences(rows):
    generator = torch.Generator().manual_seed(0)
    draw = torch.randint(0, 3, (rows, 3), generator=generator).tolist()
    return [f"the {NOUNS[a]} {VERBS[b]} a {NOUNS[c]} ." for a, b, c in draw]


def low_rank_names(trainer):
    """Return the names of the parameters that have a subspace, after at least one step."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {names[id(p)] for group in engine(trainer).param_groups if "rank" in group for p in group["params"]}


def check(trainer, out):
    """The optimizer is ours and has stepped, its settings and the logs of its subspaces are there."""
    assert isinstance(engine(trainer), LowRankOptimizer)
    assert json.loads((out / "hf_lowrank.json").read_text())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss"] < logs[0]["loss"]  # three kinds of word in fixed places: quickly learnt
    assert any("lowrank/state_mib" in entry for entry in logs)


def sft_trainer(out, tokenizer, **overrides):
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(str(out), max_length=16, bf16=False, **COMMON | overrides)
    data = Dataset.from_dict({"text": sentences(64)})
    return trl.SFTTrainer(tiny_llama(), args, train_dataset=data, processing_class=tokenizer)


def test_trl_sft(tokenizer, tmp_path):
    trainer = sft_trainer(tmp_path, tokenizer, max_steps=12)
    trainer.train()
    check(trainer, tmp_path)
    assert len(low_rank_names(trainer)) == 14  # seven of each layer


def test_trl_sft_resumes_exactly(tokenizer, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    whole = sft_trainer(tmp_path, tokenizer, **saving)
    whole.train()
    resumed = sft_trainer(tmp_path, tokenizer, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    other = dict(resumed.model.named_parameters())
    assert all(torch.equal(weight, other[name]) for name, weight in whole.model.named_parameters())


@pytest.mark.parametrize("kind", ["DPO", "Reward", "GRPO"])
def test_trl_preferences_and_rewards(kind, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    own = {"GRPO": {"num_generations": 2, "max_completion_length": 4}}.get(kind, {"max_length": 16})
    args = getattr(trl, f"{kind}Config")(str(tmp_path), bf16=False, **COMMON | {"max_steps": 2} | own)
    prompts = ["the cat sees"] * 8
    answers = {} if kind == "GRPO" else {"chosen": ["a dog ."] * 8, "rejected": ["a bird ."] * 8}
    given = {"args": args, "train_dataset": Dataset.from_dict({"prompt": prompts, **answers})}
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if kind == "GRPO":
        trainer = trl.GRPOTrainer(tiny_llama(), reward_funcs=lengths, processing_class=tokenizer, **given)
    elif kind == "DPO":
        trainer = trl.DPOTrainer(tiny_llama(), ref_model=tiny_llama(), processing_class=tokenizer, **given)
    else:
        known = {
            key: value for key, value in tiny_llama().config.to_dict().items() if key not in ("id2label", "label2id")
        }
        judge = LlamaForSequenceClassification(LlamaConfig(**known | {"num_labels": 1}))
        judge.config.pad_token_id = tokenizer.pad_token_id
        trainer = trl.RewardTrainer(judge, processing_class=tokenizer, **given)
    trainer.train()
    assert len(low_rank_names(trainer)) == 14 and {int(s["step"]) for s in engine(trainer).state.values()} == {2}


def lengths(completions, **columns):
    return [float(len(one)) for one in completions]


def test_seq2seq_trainer_on_t5(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": len(WORDS)}
    ends = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**sizes, **ends))
    rows = [tokenizer(text, text_target=text.replace("the", "a")) for text in sentences(64)]
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        generation_max_length=12,
        **COMMON,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = Seq2SeqTrainer(
        model, args, train_dataset=data, eval_dataset=data.select(range(8)), data_collator=collator
    )
    trainer.train()
    check(trainer, tmp_path)
    # q, k, v, o of three attentions, wi and wo of two feed-forward blocks; embeddings, positions and head are dense
    found = low_rank_names(trainer)
    assert len(found) == 16 and all("block" in name and "relative_attention_bias" not in name for name in found)
    assert trainer.predict(data.select(range(4))).predictions.shape[0] == 4  # generation works after it


def lora(**more):
    return get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **more))


def test_peft_modules_to_save_get_a_subspace_and_factors_stay_dense(tmp_path):
    model = lora(modules_to_save=["up_proj"])
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = train(arguments(tmp_path, OPTIM), model)
    found = low_rank_names(trainer)
    assert {name.split(".")[-4] for name in found} == {"up_proj"} and len(found) == 2
    state = engine(trainer).state
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    assert factors and all("basis" not in state[p] and len(state[p]) for p in factors)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in frozen.items())
    trainer.save_model(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("up_proj" in name for name in saved) and any("lora_A" in name for name in saved)


def test_peft_with_some_base_weights_unfrozen(tmp_path):
    model = lora()
    for name, p in model.named_parameters():
        if "down_proj" in name:
            p.requires_grad_(True)
    trainer = train(arguments(tmp_path, OPTIM), model)
    found = low_rank_names(trainer)
    assert len(found) == 2 and all(name.endswith("down_proj.weight") for name in found)


def test_peft_with_lora_factors_alone_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="every trainable matrix is a LoRA factor.*train the adapters with adamw"):
        train(arguments(tmp_path, OPTIM), lora())


@pytest.mark.parametrize("base", [Trainer, LowRankTrainer])
def test_a_trainer_that_decides_what_decays_is_followed(tmp_path, base):
    """As adamw_torch follows it: here neither embeddings nor the MLP."""

    class Deciding(base):
        def get_decay_parameter_names(self, model):
            names = super().get_decay_parameter_names(model)
            return [name for name in names if "embed" not in name and "mlp" not in name]

    found = []
    for optim in ("adamw_torch", OPTIM):
        trainer = Deciding(tiny_llama(), arguments(tmp_path, optim, weight_decay=0.1), train_dataset=tiny_data())
        groups = trainer.create_optimizer().param_groups
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        found.append({names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]})
        assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert found[0] == found[1] and any("q_proj" in name for name in found[0])


def test_a_trainer_that_chooses_optimizer_and_decay_by_itself_is_asked(tmp_path):
    class Choosing(Trainer):
        def get_decay_parameter_names(self, model):
            return ["model.norm.weight"]

        @staticmethod
        def get_optimizer_cls_and_kwargs(args, model=None):
            return torch.optim.SGD, {"lr": 0.5}

    trainer = Choosing(tiny_llama(), arguments(tmp_path, OPTIM), train_dataset=tiny_data())
    made = trainer.create_optimizer()
    assert isinstance(made, torch.optim.SGD) and {group["lr"] for group in made.param_groups} == {0.5}


@pytest.mark.parametrize("how", ["given", "created"])
def test_an_optimizer_of_the_trainers_own_is_told_of(tmp_path, how, caplog):
    class Own(Trainer):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
            return self.optimizer

    model, args = tiny_llama(), arguments(tmp_path, OPTIM, max_steps=1)
    given = (torch.optim.AdamW(model.parameters(), lr=1e-3), None) if how == "given" else (None, None)
    with caplog.at_level("WARNING", "hf_lowrank"):
        (Trainer if how == "given" else Own)(model, args, train_dataset=tiny_data(), optimizers=given).train()
    assert f"--optim {OPTIM} and its optim_args have no effect" in caplog.text and "AdamW by itself" in caplog.text


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    args = arguments(tmp_path, "adamw_torch", max_steps=1)
    made = optimizer_cls_and_kwargs(tiny_llama(), OPTIM, args=args, rank=4)
    trainer = Trainer(
        None, args, train_dataset=tiny_data(), optimizer_cls_and_kwargs=made, model_init=lambda: tiny_llama()
    )
    with pytest.raises(ValueError, match="holds no parameter of the model that is trained"):
        trainer.train()


def test_a_rank_means_nothing_without_a_subspace(tmp_path, caplog):
    """Matrices that are no wider than it are stepped as all are."""
    found = []
    for rank in ("", "rank=30,"):
        args = arguments(tmp_path, "muon_4bit", optim_args=f"{rank}scale=1")
        with caplog.at_level("WARNING", "hf_lowrank"):
            trainer = Trainer(tiny_llama(), args, train_dataset=tiny_data())
            groups = trainer.create_optimizer().param_groups
        found.append(sum(len(group["params"]) for group in groups if "rank" in group))
    assert found[0] == found[1] == 14
    assert caplog.text.count("muon_4bit has no subspace, so rank has no effect") == 1
