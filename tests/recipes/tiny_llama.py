"""A tiny LLaMA, its rows, and a training of it as a baseline under the real Trainer."""

from dataclasses import fields
from tempfile import TemporaryDirectory

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, set_seed

import hf_lowrank
from recipes.shared.baselines import BaselineArguments, loading_kwargs, prepare_, trainer_of


CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, use_cache=False
)
TOKENS = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(0))


class Rows(Dataset):
    def __len__(self):
        return len(TOKENS)

    def __getitem__(self, index):
        return {"input_ids": TOKENS[index], "labels": TOKENS[index]}


def tiny():
    set_seed(3)
    return LlamaForCausalLM(CONFIG)


def loaded(arguments, training_args):
    """The same, as a recipe loads it for a baseline."""
    if not (how := loading_kwargs(arguments, training_args)):
        return tiny()
    with TemporaryDirectory() as folder:
        tiny().save_pretrained(folder)
        set_seed(3)
        return LlamaForCausalLM.from_pretrained(folder, **how)


def options_of(baseline, **others):
    """Rank 2 and a merge every second step."""
    usual = {"adapter_rank": 2, "relora_every": 2, "relora_warmup": 1, "welore_reduction": 0.7}
    return BaselineArguments(baseline, **usual | others)


def trained(folder, baseline, *, resume=None, steps=6, optim="galore_i3s_adamw", **options):
    """Train the tiny model as a baseline; adapters of rank 2, dropout on, a merge every second step."""
    hf_lowrank.register()
    ours = {field.name for field in fields(BaselineArguments)}
    arguments = options_of(baseline, **{name: options.pop(name) for name in ours & options.keys()})
    values = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "optim_args": "rank=2" if "galore" in optim else None,
        **options,
    }
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, optim=optim, save_steps=1, logging_steps=1,
        use_cpu=True, report_to="none", disable_tqdm=True, **values,
    )  # fmt: skip
    model = loaded(arguments, args)
    trainer = trainer_of(arguments)(model, args, train_dataset=Rows(), callbacks=prepare_(model, arguments, args))
    trainer.train(resume_from_checkpoint=resume)
    return trainer
