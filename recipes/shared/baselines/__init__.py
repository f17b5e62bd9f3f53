"""What low-rank optimizers are compared with, by one flag: --baseline NAME. The names are the table in `table.py`.

What transformers, peft and bitsandbytes have is a name here and no more; the rest is one small file each. A recipe
needs a few names:

    parser = HfArgumentParser((..., BaselineArguments, TrainingArguments))
    model = Model.from_pretrained(name, **loading_kwargs(baseline_args, training_args))
    callbacks = prepare_(model, baseline_args, training_args)   # before the Trainer is made
    trainer = trainer_of(baseline_args)(model, training_args, callbacks=callbacks, ...)
    trainer.train(); to_plain_(model)                           # merged: an ordinary model to save and load

Adapters are put into the model itself, not around it. So the Trainer's checkpoints hold the whole state dict: the base
weights (which merges change, and which a model trained from scratch has nowhere else), the adapters, and what trains
beside them. A peft wrapper would save the adapters alone.
"""

from recipes.shared.baselines.adapters import KINDS, add_lora_
from recipes.shared.baselines.arguments import BaselineArguments
from recipes.shared.baselines.prepare import adapter_parameters, prepare_, to_plain_, trainer_of
from recipes.shared.baselines.quantized import loading_kwargs
from recipes.shared.baselines.table import BASELINES, Baseline, fit_for


__all__ = [
    "BASELINES",
    "KINDS",
    "Baseline",
    "BaselineArguments",
    "adapter_parameters",
    "add_lora_",
    "fit_for",
    "loading_kwargs",
    "prepare_",
    "to_plain_",
    "trainer_of",
]
