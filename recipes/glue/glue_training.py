"""One training on one task: from arguments to a dictionary of results."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import glue_data
import numpy as np
import torch
from datasets import Dataset
from glue_tasks import MistakeError, Task, task_named
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
from transformers.trainer_utils import get_last_checkpoint


HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from baselines import BaselineArguments, prepare_, to_plain_  # noqa: E402


LOCAL_METRIC = HERE / "glue_metric.py"
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
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of local data: TASK/train.csv and TASK/validation.csv, or .tsv. Default: the hub."},
    )
    max_seq_length: int = field(default=512, metadata={"help": "Longer texts are cut to this many tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})


def train(glue: GlueArguments, baseline: BaselineArguments, args: TrainingArguments) -> dict[str, Any]:
    """Fine-tune and evaluate, and return what the tables need.

    Args:
        glue: task, encoder and data.
        baseline: what trains instead of the optimizer that `args` names, if anything.
        args: transformers' arguments.

    Returns:
        Metrics of every validation set, seconds of training, steps, and MiB of weights, of the optimizer's state and
        (on CUDA) of the peak; also written to `result.json` in the output folder.

    Raises:
        MistakeError: if data, model or options are wrong. Nothing has been written then.
    """
    task = task_named(glue.task)
    resume = checkpoint_to_resume(args)
    splits = glue_data.load(glue.task, glue.data_dir)
    tokenizer, model = load_encoder(glue.model_name_or_path, task, seed=args.seed)
    splits = {name: prepare(name, rows, glue, task, tokenizer) for name, rows in splits.items()}
    training = splits.pop("train")
    trainer = make_trainer(model, baseline, args, training, splits[task.validation[0]], tokenizer, glue)
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(args.device)
    done = trainer.train(resume_from_checkpoint=resume)
    result = {
        "metrics": {split: scores(trainer.evaluate(rows), task) for split, rows in splits.items()},
        "train_seconds": round(done.metrics["train_runtime"], 2),
        "train_loss": round(done.training_loss, 4),
        "steps": done.global_step,
        **memory(trainer),
    }
    if trainer.is_world_process_zero():
        (Path(args.output_dir) / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    if args.save_strategy != "no":
        to_plain_(model)
        trainer.save_model()
    del trainer, model
    gc.collect()  # a Trainer and its callbacks refer to each other, and the next training may want the memory
    return result


def prepare(split: str, rows: Dataset, glue: GlueArguments, task: Task, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return a split cut to size and tokenized."""
    count = glue.max_train_samples if split == "train" else glue.max_eval_samples
    length = min(glue.max_seq_length, tokenizer.model_max_length)
    return glue_data.tokenize(glue_data.first_rows(rows, count), task, tokenizer, length)


def make_trainer(
    model: PreTrainedModel,
    baseline: BaselineArguments,
    args: TrainingArguments,
    training: Dataset,
    validation: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    glue: GlueArguments,
) -> Trainer:
    """Return a Trainer. Mistakes in the options of its optimizer are told before it makes its folder."""
    try:
        callbacks = prepare_(model, baseline, args, also_train=head_names(model))
        optimizer = Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ValueError, ImportError) as error:
        raise MistakeError(str(error)) from error
    return Trainer(
        model,
        args,
        train_dataset=training,
        eval_dataset=validation,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=metrics_of(glue.task, task_named(glue.task), local=glue.data_dir is not None),
        callbacks=callbacks,
        optimizer_cls_and_kwargs=optimizer,
    )


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """Return the checkpoint that --resume_from_checkpoint means: a folder, or `true` for the newest of output_dir.

    Raises:
        MistakeError: if there is none.
    """
    wanted = args.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted.lower() == "true":
        wanted = (get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None) or args.output_dir
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise MistakeError(f"there is no checkpoint to resume from in {wanted}")
    return wanted


def load_encoder(name: str, task: Task, *, seed: int) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return tokenizer and model; the head is new and drawn from the seed.

    Raises:
        MistakeError: if there is no such model, or no way to it.
    """
    kind = {"problem_type": "regression"} if task.labels == 1 else {}
    set_seed(seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=task.labels, **kind)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise MistakeError(
            f"cannot load the model {name!r} ({reason}); give a folder with --model_name_or_path, or a name on the "
            "hub and a network"
        ) from error
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
    return evaluate.load(str(LOCAL_METRIC), name)


def scores(metrics: dict[str, float], task: Task) -> dict[str, float]:
    """Return the task's metrics from those of Trainer.evaluate."""
    return {name: float(metrics[f"eval_{name}"]) for name in task.metrics}


def memory(trainer: Trainer) -> dict[str, float]:
    """Return MiB of weights and optimizer state, and on CUDA the peak of everything."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    state = [x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor)]
    weights = [p.nbytes for p in trainer.model.parameters()]
    sizes = {"weights_mib": sum(weights) / MIB, "state_mib": sum(state) / MIB}
    if trainer.args.device.type == "cuda":
        sizes["peak_mib"] = torch.cuda.max_memory_allocated(trainer.args.device) / MIB
    return {name: round(size, 2) for name, size in sizes.items()}
