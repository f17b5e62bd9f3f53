"""Pretrain a LLaMA from scratch by the low-rank papers' protocol: C4, 256 tokens, cosine to 10 %, perplexity.

    python recipes/c4_pretraining/run.py recipes/c4_pretraining/configs/galore_60m.yaml --output_dir runs/galore_60m
    torchrun --nproc_per_node 8 recipes/c4_pretraining/run.py .../i3s_350m.yaml --per_device_train_batch_size 64

A YAML file holds a paper's settings for one size; options after it win. --help lists them all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import datasets
import torch
import yaml
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_lowrank


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.c4_pretraining import data, models  # noqa: E402
from recipes.c4_pretraining.budget import (  # noqa: E402
    BudgetArguments,
    Perplexity,
    check_numbers,
    require_text,
    rows_per_step,
    set_accumulation,
    set_steps,
)
from recipes.c4_pretraining.stream import Collator, HeldOut, StreamCallback, TokenStream  # noqa: E402
from recipes.shared.baselines import BASELINES, BaselineArguments, prepare_, to_plain_  # noqa: E402
from recipes.shared.common import (  # noqa: E402
    ArgumentParser,
    StepTimer,
    checkpoint_to_resume,
    first_line,
    machine,
    negative_log_likelihood,
    nothing_left_behind,
    sizes,
    state_bytes,
    stop,
)
from recipes.shared.rates import optimizer_with_two_rates  # noqa: E402


DATA_SEED = 42
"""The papers' seed for the order of the documents, where --data_seed gives none."""


Arguments = tuple[models.ModelArguments, data.DataArguments, BudgetArguments, BaselineArguments, TrainingArguments]


def parser() -> ArgumentParser:
    """Return the parser of the command line and of the YAML files."""
    hf_lowrank.register()
    return ArgumentParser(Arguments.__args__)


def main() -> None:
    """Train and evaluate as the command line says."""
    arguments = parse(sys.argv[1:])
    args = arguments[-1]
    with nothing_left_behind(Path(args.output_dir)):
        checkpoint = checkpoint_to_resume(args)
        trainer, held_out, timer, keeper = prepare(*arguments, checkpoint)
    if args.do_train:
        train(trainer, timer, keeper, checkpoint)
    if args.do_eval:
        metrics = trainer.evaluate() | {"eval_tokens": held_out.tokens}
        for record in (trainer.log_metrics, trainer.save_metrics):
            record("eval", metrics)


def prepare(
    model_args: models.ModelArguments,
    data_args: data.DataArguments,
    budget: BudgetArguments,
    baseline: BaselineArguments,
    training_args: TrainingArguments,
    checkpoint: str | None,
) -> tuple[Trainer, HeldOut, StepTimer, StreamCallback]:
    """Return the trainer, the rows held out, and what times the steps and keeps the position."""
    models.shape(model_args)
    check_numbers(model_args, data_args, budget, training_args)
    set_accumulation(budget, training_args)
    tokenizer, epoch_rows, held_out = load_data(data_args, training_args)
    set_steps(budget, training_args, data.mean_tokens(epoch_rows(0)), data_args)

    set_seed(training_args.seed)
    llama = models.config(model_args, tokenizer, data_args.block_size)
    model = build_or_load(model_args, llama, checkpoint, training_args, baseline)
    timer = StepTimer()
    stream = TokenStream(epoch_rows, rows_per_step=rows_per_step(training_args))
    keeper = StreamCallback(stream, timer)
    if checkpoint and not training_args.dataloader_num_workers:
        training_args.ignore_data_skip = keeper.resume(checkpoint)
    try:
        callbacks = prepare_(model, baseline, training_args, stage="pretraining")
        rate = model_args.matrix_learning_rate
        optimizer = optimizer_with_two_rates(model, training_args, matrix_learning_rate=rate)
        trainer = Trainer(
            model,
            training_args,
            train_dataset=stream,
            eval_dataset=held_out,
            data_collator=Collator(block_size=data_args.block_size, padding=tokenizer.eos_token_id),
            processing_class=tokenizer,
            compute_metrics=Perplexity(training_args.per_device_train_batch_size),
            preprocess_logits_for_metrics=negative_log_likelihood,
            callbacks=[timer, keeper, *callbacks],
            optimizer_cls_and_kwargs=optimizer,
        )
    except (ValueError, ImportError) as error:  # options that are wrong, or do not go together
        stop(str(error))
    return trainer, held_out, timer, keeper


def load_data(
    args: data.DataArguments, training_args: TrainingArguments
) -> tuple[PreTrainedTokenizerBase, Callable[[int], datasets.IterableDataset], HeldOut]:
    """Return the tokenizer, the training rows by epoch, and the rows held out."""
    datasets.logging.set_verbosity_error()  # it warns of shuffle buffers, which hold nothing here
    folder = Path(args.tokenizer_dir or Path(training_args.output_dir) / "tokenizer")
    with training_args.main_process_first(desc="tokenizer"):
        training, validation = (data.documents(args, split) for split in ("train", "validation"))
        tokenizer = data.load_tokenizer(args, folder)
    seed = DATA_SEED if training_args.data_seed is None else training_args.data_seed
    held_out = HeldOut(data.rows(validation, tokenizer, args, seed=seed), tokens=args.eval_tokens)
    require_text(held_out.tokens, len(held_out), args, "validation")
    return tokenizer, lambda epoch: data.rows(training, tokenizer, args, seed=seed + epoch), held_out


def parse(line: list[str]) -> Arguments:
    """Read a command line: YAML files first, whose values the options after them replace."""
    reader = parser()
    try:
        while line and line[0].endswith((".yaml", ".yml")):
            reader.set_defaults(**read_yaml(Path(line.pop(0)), reader))
        return reader.parse_args_into_dataclasses(line)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        stop(first_line(error))


def read_yaml(file: Path, reader: ArgumentParser) -> dict[str, Any]:
    """Return the values of a YAML file."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        stop(f"cannot read {file}: {getattr(error, 'strerror', None) or error}")
    except yaml.YAMLError as error:
        stop(f"{file} is not YAML: {' '.join(str(error).split())}")
    if not isinstance(values, dict):
        stop(f"{file} holds no `option: value` lines")
    known = {action.dest for action in reader._actions}
    for key in values:
        if key not in known:
            stop(f"{file} sets {key}, which is no option; --help lists them")
    return values


def build_or_load(
    args: models.ModelArguments,
    llama: Any,
    checkpoint: str | None,
    training_args: TrainingArguments,
    baseline: BaselineArguments,
) -> LlamaForCausalLM:
    """Return a new model; or, to evaluate alone, the one of a folder."""
    if training_args.do_train:
        return models.build(args, llama)
    if checkpoint is None:
        stop("without --do_train, name the model to evaluate with --resume_from_checkpoint")
    if baseline.baseline and BASELINES[baseline.baseline].adapt_:
        stop("evaluate the merged model, which a finished training leaves in its --output_dir, without --baseline")
    try:
        return LlamaForCausalLM.from_pretrained(checkpoint)
    except Exception as error:  # no model there, or half a file: many kinds
        stop(f"cannot load a model from {checkpoint}: {first_line(error)}")


def train(trainer: Trainer, timer: StepTimer, keeper: StreamCallback, checkpoint: str | None) -> None:
    """Train; leave an ordinary model, with numbers beside it."""
    if trainer.args.ignore_data_skip and checkpoint:
        # The loader drew a number when it started, after Trainer had restored the generators: dropout would go astray.
        # Trainer itself restores them again where it skips data.
        keeper.before_first_step = partial(trainer._load_rng_state, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    report(trainer, timer, keeper)
    if not trainer.is_fsdp_enabled:  # merging gathers nothing: a sharded model keeps its adapters
        to_plain_(trainer.model)
    trainer.save_model()
    trainer.save_state()


def report(trainer: Trainer, timer: StepTimer, keeper: StreamCallback) -> None:
    """Write sizes, speed, memory and budget to train_results.json and all_results.json."""
    args = trainer.args
    steps, updates = (x[1:] or x or [math.nan] for x in (timer.step_seconds, timer.optimizer_seconds))
    position = keeper.stream.position(trainer.state.global_step)
    metrics = {
        **sizes(trainer.model),
        "steps": trainer.state.global_step,
        "rows_per_step": keeper.stream.rows_per_step,
        "train_seconds": keeper.seconds(),
        "rows_per_second": keeper.stream.rows_per_step / mean(steps),
        "optimizer_ms_median": 1e3 * median(updates),
        "optimizer_ms_mean": 1e3 * mean(updates),
        "optimizer_state_mib": state_bytes(trainer.optimizer) / 2**20,
        "machine": machine(),
    }
    if position:
        metrics["train_tokens"] = position["tokens"]
    if args.device.type == "cuda":
        metrics["peak_memory_mib"] = torch.cuda.max_memory_allocated(args.device) / 2**20
    for record in (trainer.log_metrics, trainer.save_metrics):
        record("train", metrics)


if __name__ == "__main__":
    main()
