"""A tiny LLaMA, tiny data and one way to train them through Trainer."""

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_lowrank
import hf_lowrank.methods.resolve


sys.path.insert(0, str(Path(__file__).parents[1]))  # the workers of other tests import this file too
from fitting import fitting  # noqa: E402


hf_lowrank.register()
OPTIONS = "rank=4,update_proj_gap=3"


CODED = {"vocab_size": 512, "intermediate_size": 1100}
"""Sizes of a tiny LLaMA of which some moments are large enough to be stored in 8 bits, at rank 4."""


def tiny_llama(dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "vocab_size": 32,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
        }
        | overrides
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_data(rows=32):
    gen = torch.Generator().manual_seed(1)
    blocks = [torch.randint(0, 32, (12,), generator=gen) for _ in range(rows)]
    return [{"input_ids": block, "labels": block} for block in blocks]


def options_for(optim, **options):
    """Rank 4 and an interval of 3, as far as the method has such options."""
    if optim not in hf_lowrank.methods.resolve.names():
        return None
    fitted = fitting(optim, {"rank": 4, "update_proj_gap": 3, **options})
    fitted.pop("total_steps", None)  # Trainer knows it
    return ",".join(f"{key}={value}" for key, value in fitted.items())


def arguments(output_dir: Path, optim: str, **overrides):
    values = {
        "output_dir": str(output_dir),
        "optim": optim,
        "optim_args": options_for(optim),
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**values | overrides)


def train(args, model=None, trainer_class=Trainer, resume=None, **kwargs):
    trainer = trainer_class(model or tiny_llama(), args, train_dataset=tiny_data(), **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def engine(trainer):
    """The LowRankOptimizer inside accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def shown(page, language):
    """Return the first block of a language on a page of the documentation."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text()
    found = re.search(rf"^```[ ]*(?:\{{\.)?{language}[^\n]*\n(.*?)^```$", text, re.M | re.S)
    assert found, f"{page} has no block of {language}"
    return found[1]


@pytest.fixture(autouse=True)
def registered():
    hf_lowrank.register()
