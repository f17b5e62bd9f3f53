"""One training on one task: from arguments to a dictionary of results."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lowrank.hf import local_metrics
from recipes.glue import data
from recipes.glue.tasks import Task, task_named
from recipes.shared.baselines import BaselineArguments, loading_kwargs, prepare_, to_plain_, trainer_of
from recipes.shared.common import checkpoint_to_resume, require_at_least, state_bytes, stop


MIB = 2**20


@dataclass
class GlueArguments:
    """Task, encoder and data."""

    task: str = field(
        metadata={"help": "cola, stsb, mrpc, rte, sst2, mnli, qnli or qqp; several or `all` for a comparison."}
    )
    model_name_or_path: str = field(
        default="FacebookAI/roberta-base", metadata={"help": "Encoder: a name on the hub, or a folder."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, eager or another of transformers'. On a CPU eager trains short texts 1.5 x as fast."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of local data: TASK/train.csv and TASK/validation.csv, or .tsv. Default: the hub."},
    )
    max_seq_length: int = field(default=512, metadata={"help": "Longer texts are cut to this many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many rows at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many at most."})
    warmup_share: float = field(
        default=0.0, metadata={"help": "Warm-up as a share of all steps, where --warmup_steps gives none."}
    )


def train(glue: GlueArguments, baseline: BaselineArguments, args: TrainingArguments) -> dict[str, Any]:
    """Fine-tune and evaluate, and return what the tables need.

    Args:
        glue: task, encoder and data.
        baseline: what trains instead of the optimizer that `args` names, if anything.
        args: transformers' arguments.

    Returns:
        Metrics of every validation set, seconds of training, steps, and MiB of weights, of the optimizer's state and
        (on CUDA) of the peak; also written to `result.json` in the output folder.

    Ends with one sentence if data, model or options are wrong. Nothing has been written then.
    """
    task = task_named(glue.task)
    resume = checkpoint_to_resume(args)
    check_numbers(glue, args)
    set_warmup(glue.warmup_share, args)
    rows = data.load(glue.task, glue.data_dir)
    tokenizer, model = load_encoder(glue, task, baseline, args)
    splits = {name: prepared(split, name, glue, tokenizer) for name, split in rows.items()}
    try:  # the optimizer is asked for here: Trainer would make its folder before it finds a mistake
        callbacks = prepare_(model, baseline, args, stage="fine-tuning", also_train=head_names(model))
        optimizer = Trainer.get_optimizer_cls_and_kwargs(args, model)
        trainer = trainer_of(baseline)(
            model,
            args,
            train_dataset=splits.pop("train"),
            eval_dataset=splits[task.validation[0]],
            data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=metrics_of(glue.task, task, local=glue.data_dir is not None),
            callbacks=callbacks,
            optimizer_cls_and_kwargs=optimizer,
        )
    except (ValueError, ImportError) as error:
        stop(str(error))
    result = run(trainer, splits, task, resume)
    finish(trainer, result)
    del trainer, model
    gc.collect()  # the two refer to each other, and the next training may want the memory
    return result


def prepared(rows: Dataset, split: str, glue: GlueArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the tokenized rows of a split, or as many of them as are asked for."""
    count = glue.max_train_samples if split == "train" else glue.max_eval_samples
    return data.tokenize(data.first_rows(rows, count), task_named(glue.task), tokenizer, glue.max_seq_length)


def finish(trainer: Trainer, result: dict[str, Any]) -> None:
    """Leave the results and the log, and an ordinary model where models are saved."""
    trainer.save_state()
    if trainer.is_world_process_zero():
        (Path(trainer.args.output_dir) / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    if trainer.args.save_strategy != "no":
        to_plain_(trainer.model)
        trainer.save_model()


def run(trainer: Trainer, validation: dict[str, Dataset], task: Task, resume: str | None) -> dict[str, Any]:
    """Train, evaluate and measure."""
    device = trainer.args.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    done = trainer.train(resume_from_checkpoint=resume)
    weights = sum(p.nbytes for p in trainer.model.parameters())
    sizes = {"weights_mib": weights / MIB, "state_mib": state_bytes(trainer.optimizer) / MIB}
    if device.type == "cuda":
        sizes["peak_mib"] = torch.cuda.max_memory_allocated(device) / MIB
    return {
        "metrics": {split: scores(trainer.evaluate(rows), task) for split, rows in validation.items()},
        # of one that went on from a checkpoint these would be the last session's
        **({} if resume else {"train_seconds": round(done.metrics["train_runtime"], 2)}),
        **({} if resume else {"train_loss": round(done.training_loss, 4)}),
        "steps": done.global_step,
        **{name: round(size, 2) for name, size in sizes.items()},
    }


def check_numbers(glue: GlueArguments, args: TrainingArguments) -> None:
    """End with one sentence where a number makes no sense."""
    require_at_least(1, max_train_samples=glue.max_train_samples, max_eval_samples=glue.max_eval_samples)
    require_at_least(1, per_device_train_batch_size=args.per_device_train_batch_size)
    require_at_least(3, max_seq_length=glue.max_seq_length)  # a token between two special ones


def set_warmup(share: float, args: TrainingArguments) -> None:
    """Warm up over a share of all steps, where the arguments say nothing of it."""
    if not 0 <= share < 1:
        stop(f"--warmup_share must be at least 0 and below 1, not {share:g}")
    if share and not args.warmup_steps and not getattr(args, "warmup_ratio", 0):
        # transformers 5 reads warmup_steps below 1 as a share; 4 has another name for it
        setattr(args, "warmup_steps" if int(transformers.__version__.split(".")[0]) >= 5 else "warmup_ratio", share)


def load_encoder(
    glue: GlueArguments, task: Task, baseline: BaselineArguments, args: TrainingArguments
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return tokenizer and model; the head is new and drawn from the seed.

    Ends with one sentence if there is no such model, or no way to it.
    """
    name = glue.model_name_or_path
    kind = {"num_labels": task.labels, "attn_implementation": glue.attn_implementation}
    kind |= {"problem_type": "regression"} if task.labels == 1 else {}
    try:
        kind |= loading_kwargs(baseline, args)
    except ValueError as error:
        stop(str(error))
    set_seed(args.seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, **kind)
    except Exception as error:  # no network, no such folder, half a file: many kinds
        reason = str(error).split("\n")[0].rstrip(".")
        stop(
            f"cannot load the model {name!r} ({reason}); give a folder with --model_name_or_path, or a name on the "
            "hub and a network"
        )
    # The loss is a mean over rows and does not take Trainer's count of them. Trainer goes by the signature of forward,
    # and would add the losses of micro-batches up, and multiply them by the number of processes.
    model.accepts_loss_kwargs = False
    return tokenizer, model


def head_names(model: PreTrainedModel) -> str:
    """Return a regular expression for the names of the head's parameters: all that are not the encoder's."""
    return rf"^(?!{model.base_model_prefix}\.)"


def metrics_of(name: str, task: Task, *, local: bool) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function that Trainer calls with predictions: logits (rows, labels) and targets (rows,)."""
    metric = load_metric(name, local=local)

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        predicted = np.squeeze(logits, 1) if task.labels == 1 else logits.argmax(1)
        return metric.compute(predictions=predicted, references=prediction.label_ids)

    return compute


def load_metric(name: str, *, local: bool) -> evaluate.EvaluationModule:
    """Return GLUE's metric of a task: the hub's, or ours, which has the same values, if `local` or without a hub."""
    if not local:
        try:
            return evaluate.load("glue", name)
        except (OSError, ValueError):
            pass  # the data may be in the cache where the metric is not
    return evaluate.load(local_metrics.path("glue"), name)


def scores(metrics: dict[str, float], task: Task) -> dict[str, float]:
    """Return the task's metrics from those of Trainer.evaluate."""
    return {name: float(metrics[f"eval_{name}"]) for name in task.metrics}
