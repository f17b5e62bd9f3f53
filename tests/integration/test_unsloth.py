"""unsloth: its trainer, as it trains where there is no GPU, and its learning rate of embeddings."""

import pytest
import torch
from conftest import engine, tiny_llama
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.training_args import TrainingArguments

import hf_lowrank
from hf_lowrank.hf.unsloth import take_embedding_learning_rate


OPTIM, RATE = "galore_i3s_adamw", 2e-4


class Arguments(TrainingArguments):
    """As UnslothTrainingArguments declare it, which need a GPU or unsloth's own path for CPUs."""

    embedding_learning_rate: float | None = None


def arguments(folder, optim=OPTIM, optim_args="rank=4", rate=RATE):
    args = Arguments(str(folder), optim=optim, optim_args=optim_args, use_cpu=True)
    args.embedding_learning_rate = rate
    return args


def knows_rates():
    try:
        hf_lowrank.param_groups(tiny_llama(), method=OPTIM, rank=4, embedding_lr=RATE, head_lr=RATE)
    except ValueError:
        return False
    return True


def freeze(module):
    module.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("tied", "frozen", "options"),
    [
        (False, (), "rank=4,embedding_lr=0.0002,head_lr=0.0002"),
        (True, (), "rank=4,embedding_lr=0.0002"),
        (False, ("lm_head",), "rank=4,embedding_lr=0.0002"),
        (False, ("model.embed_tokens",), "rank=4,head_lr=0.0002"),
    ],
)
def test_the_argument_becomes_options_for_the_weights_that_are_trained(tied, frozen, options, tmp_path):
    model, args = tiny_llama(tie_word_embeddings=tied), arguments(tmp_path)
    for name in frozen:
        freeze(model.get_submodule(name))
    take_embedding_learning_rate(args, model)
    assert (args.optim_args, args.embedding_learning_rate) == (options, None)
    take_embedding_learning_rate(args, model)  # a second trainer of the same arguments
    assert args.optim_args == options


@pytest.mark.parametrize(("optim", "rate"), [("adamw_torch", RATE), (OPTIM, None)])
def test_else_nothing_changes(optim, rate, tmp_path):
    args = arguments(tmp_path, optim, None, rate)
    take_embedding_learning_rate(args, nn.Linear(2, 2))
    assert (args.optim_args, args.embedding_learning_rate) == (None, rate)


@pytest.fixture
def trainer(tmp_path):
    """UnslothTrainer on a tiny model; unsloth changes what trl's names stand for, and this puts them back."""
    trl = pytest.importorskip("trl")
    before = {name: vars(trl).get(name) for name in ("SFTTrainer", "SFTConfig")}
    unsloth = pytest.importorskip("unsloth", reason="unsloth is not installed")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[UNK]", "the", "cat", "sees", "a", "dog"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    common = {"learning_rate": 1e-2, "max_steps": 3, "max_length": 16, "bf16": False, "use_cpu": True}

    def make(**changes):
        options = {"optim": OPTIM, "optim_args": "rank=4,update_proj_gap=2", "report_to": "none", **common, **changes}
        args = unsloth.UnslothTrainingArguments(output_dir=str(tmp_path), save_strategy="no", **options)
        data = Dataset.from_dict({"text": ["the cat sees a dog"] * 32})
        return unsloth.UnslothTrainer(tiny_llama(), args=args, train_dataset=data, processing_class=tokenizer)

    yield make
    for name, value in before.items():
        setattr(trl, name, value)


def test_its_trainer_trains_with_it(trainer):
    made = trainer()
    before = [p.clone() for p in made.model.parameters()]
    made.train()
    optimizer = engine(made)
    assert isinstance(optimizer, hf_lowrank.LowRankOptimizer)
    assert sum(len(group["params"]) for group in optimizer.param_groups if "rank" in group) == 14
    assert all(not torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))


@pytest.mark.skipif(not knows_rates(), reason="there is no option embedding_lr yet")
def test_its_embedding_learning_rate_reaches_embeddings_and_head_alone(trainer):
    made = trainer(embedding_learning_rate=RATE, lr_scheduler_type="constant")
    made.train()
    rates = {name: group["lr"] for group in engine(made).param_groups for name in group["param_names"]}
    own = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {rates[name] for name in own} == {RATE}
    assert {rate for name, rate in rates.items() if name not in own} == {1e-2}


def test_with_another_optimizer_it_stays_unsloths_own(trainer):
    made = trainer(embedding_learning_rate=RATE, optim="adamw_torch", optim_args=None)
    made.train()
    assert made.args.embedding_learning_rate == RATE
    assert {group["initial_lr"] for group in engine(made).param_groups} == {1e-2, RATE}
