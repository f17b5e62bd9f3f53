"""Adapters that are merged while training, and start anew: ReLoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

from recipes.shared.baselines.adapters import ADAPTER


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


def relora(args: BaselineArguments) -> TrainerCallback:
    """Return the callback of --baseline relora."""
    if args.adapter_kind == "dora":
        raise ValueError("relora merges factors, and DoRA's norms would change with them: set another --adapter_kind")
    return ReLoRACallback(args.relora_every, args.relora_warmup)


class ReLoRACallback(TrainerCallback):
    """Merges the adapters into the base every `every` steps and starts new ones (ReLoRA, arXiv 2307.05695).

    At a merge W0 <- W0 + (alpha / r) B A, A is drawn anew, B is zero: the model computes what it did before. The
    optimizer's state of the factors starts anew too (the authors' code zeroes 99.9 % of it at random). The learning
    rate then rises linearly, within `warmup` steps, to where the schedule of --lr_scheduler_type is by that time: with
    a cosine that is the paper's jagged cosine. There is no full-rank warm start; the tables of the low-rank papers
    have none either.

    New factors come from a generator keyed by (seed, step), the same on every process and in a run that is resumed.

    Args:
        every: steps from one merge to the next; best a divisor of the number of steps.
        warmup: steps of warm-up after a merge.
    """

    def __init__(self, every: int, warmup: int) -> None:
        if not 0 <= warmup < every:
            raise ValueError(f"--relora_warmup must be at least 0 and below --relora_every, not {warmup} and {every}")
        self.every = every
        self.warmup = warmup

    def on_train_begin(self, args: TrainingArguments, *unused: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        """Give the schedule its teeth."""
        if not isinstance(lr_scheduler, LambdaLR):
            raise ValueError(f"relora needs a schedule by steps; --lr_scheduler_type {args.lr_scheduler_type} is none")
        multipliers = lr_scheduler.lr_lambdas
        lr_scheduler.lr_lambdas = [jagged(f, every=self.every, warmup=self.warmup) for f in multipliers]

    def on_step_end(
        self, args: TrainingArguments, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Merge and restart where it is due. A checkpoint of this step is written after it, and so holds the merge."""
        if state.global_step % self.every == 0:
            factors = merge_and_restart_(model, seed=1_000_003 * args.seed + state.global_step)
            states = getattr(optimizer, "optimizer", optimizer).state  # accelerate wraps it
            for p in factors:
                reset_(states[p])


@torch.no_grad()
def merge_and_restart_(model: nn.Module, *, seed: int) -> list[Tensor]:
    """Add every adapter to its base weight and start a new one: A uniform as nn.Linear's weight, B zero.

    Returns:
        The factors, the same parameters as before.
    """
    generator = torch.Generator().manual_seed(seed)
    factors: list[Tensor] = []
    for layer in _lora_layers(model):
        _add_(layer.get_base_layer().weight, layer.get_delta_weight(ADAPTER))
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # (r, in), (out, r)
        bound = A.shape[1] ** -0.5
        A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
        B.zero_()
        factors += [A, B]
    return factors


def reset_(state: dict[str, Any]) -> None:
    """Put the state of one parameter back to its beginning, in place, so that every key stays where it is.

    Known: torch's AdamW, bitsandbytes' (its 8-bit moments are code x absmax, and `qmap` is the codes' meaning) and
    hf_lowrank's.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor):
            state[key] = 0  # the number of steps
        elif not key.startswith("qmap"):
            value.zero_()


def jagged(multiplier: Callable[[int], float], *, every: int, warmup: int) -> Callable[[int], float]:
    """Return a learning rate multiplier that follows another one, with a linear warm-up after every merge.

    With w = warmup, K = every and k the steps since the last merge (the first K steps have none): k / w times
    the multiplier at the end of this warm-up where k < w, else the multiplier itself.
    """

    def with_restarts(step: int) -> float:
        since = step % every
        if step < every or since >= warmup:
            return multiplier(step)
        return since / warmup * multiplier(step - since + warmup)

    return with_restarts


def _lora_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def _add_(weight: Tensor, delta: Tensor) -> None:
    """Add in fp32; a weight in bf16 rounds once."""
    weight.copy_(weight.float() + delta.float())
