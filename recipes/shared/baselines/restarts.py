"""Adapters that are merged while training, and start anew: ReLoRA, COLA, PLoRA, ReMoRA."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments

from hf_lowrank.tensors.random import generator
from recipes.shared.baselines.adapters import ADAPTER
from recipes.shared.baselines.mora import MoRALinear


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


Multiplier = Callable[[float], float]
"""A schedule of the Trainer: from a step to the factor of its learning rate."""

RESET = ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit")
"""The values of --optim whose state `reset_` knows."""


def relora(args: BaselineArguments, training_args: TrainingArguments) -> TrainerCallback:
    """Return the callback of ReLoRA (arXiv 2307.05695) and ReMoRA (arXiv 2405.12130).

    The learning rate rises linearly, within `relora_warmup` steps, to where the schedule of --lr_scheduler_type is by
    that time: with a cosine that is the paper's jagged cosine. There is no full-rank warm start; the tables of the
    low-rank papers have none either.
    """
    every, warmup = args.relora_every, args.relora_warmup
    if not 0 <= warmup < every:
        raise ValueError(f"--relora_warmup must be at least 0 and below --relora_every, not {warmup} and {every}")
    schedule = partial(jagged, every=every, warmup=warmup)
    return _restarts(args, training_args, lambda total: every, lambda multiplier, total: schedule(multiplier))


def cola(args: BaselineArguments, training_args: TrainingArguments) -> TrainerCallback:
    """Return the callback of COLA, a chain of LoRA (arXiv 2401.04151): `cola_links` links of equal length.

    Every link goes through the whole schedule of --lr_scheduler_type, warm-up and end included.
    """
    if (links := args.cola_links) < 1:
        raise ValueError(f"--cola_links must be at least 1, not {links}")
    return _restarts(args, training_args, lambda total: ceil(total / links), _chain(lambda total: ceil(total / links)))


def plora(args: BaselineArguments, training_args: TrainingArguments) -> TrainerCallback:
    """Return the callback of PLoRA, PeriodicLoRA (arXiv 2402.16141): COLA with stages of `relora_every` steps.

    The paper's momentum keeps a share mu of the old adapter. Its formula was not within reach; this is our reading:
    W0 <- W0 + (1 - mu) s B A and B <- mu B, which leaves the model as it is for every mu. With mu = 0 A is drawn anew.
    """
    if not 0 <= args.plora_momentum < 1:
        raise ValueError(f"--plora_momentum must be at least 0 and below 1, not {args.plora_momentum:g}")
    if (every := args.relora_every) < 1:
        raise ValueError(f"--relora_every must be at least 1, not {every}")
    return _restarts(args, training_args, lambda total: every, _chain(lambda total: every), keep=args.plora_momentum)


def _chain(length: Callable[[int], int]) -> Callable[[Multiplier, int], Multiplier]:
    return lambda multiplier, total: chained(multiplier, every=length(total), total=total)


def _restarts(
    args: BaselineArguments,
    training_args: TrainingArguments,
    every: Callable[[int], int],
    schedule: Callable[[Multiplier, int], Multiplier],
    keep: float = 0.0,
) -> TrainerCallback:
    """Return the callback, or say why this cannot be restarted."""
    if args.adapter_kind == "dora" and args.baseline != "remora":
        raise ValueError(
            f"{args.baseline} merges factors, and DoRA's norms would change with them: set another --adapter_kind"
        )
    optim = str(getattr(training_args.optim, "value", training_args.optim))
    if optim not in RESET:
        raise ValueError(
            f"{args.baseline} starts the optimizer's state anew at every merge, and cannot with --optim {optim}: "
            f"choose one of {', '.join(RESET)}"
        )
    return RestartCallback(every, schedule, keep=keep)


class RestartCallback(TrainerCallback):
    """Merges the adapters into the base every so many steps and starts new ones.

    At a merge W0 <- W0 + s B A, A is drawn anew, B is zero: the model computes what it did before. The optimizer's
    state of the factors starts anew too, its step count included (ReLoRA's code zeroes 99.9 % of the moments at random
    and keeps the count, so that its first directions are 3.2 times as long). After the last step there is no merge.

    New factors come from a generator keyed by (seed, step), the same on every process and in a run that is resumed.

    Args:
        every: steps from one merge to the next, of the number of all steps.
        schedule: the schedule with restarts, of the one without and the number of all steps.
        keep: share of the adapter that is not merged, and stays.
    """

    def __init__(
        self, every: Callable[[int], int], schedule: Callable[[Multiplier, int], Multiplier], *, keep: float
    ) -> None:
        self.every = every
        self.schedule = schedule
        self.keep = keep

    def on_train_begin(
        self, args: TrainingArguments, state: Any, *unused: Any, lr_scheduler: Any, **kwargs: Any
    ) -> None:
        """Give the schedule its teeth."""
        if not isinstance(lr_scheduler, LambdaLR):
            raise ValueError(f"merges need a schedule by steps; --lr_scheduler_type {args.lr_scheduler_type} is none")
        multipliers = lr_scheduler.lr_lambdas
        lr_scheduler.lr_lambdas = [self.schedule(multiplier, state.max_steps) for multiplier in multipliers]

    def on_step_end(
        self, args: TrainingArguments, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Merge and restart where it is due. A checkpoint of this step is written after it, and so holds the merge."""
        step = state.global_step
        if step % self.every(state.max_steps) == 0 and step < state.max_steps:
            factors = merge_and_restart_(model, generator(args.seed, step), keep=self.keep)
            states = getattr(optimizer, "optimizer", optimizer).state  # accelerate wraps it
            for p in factors:
                reset_(states[p])


@torch.no_grad()
def merge_and_restart_(model: nn.Module, gen: torch.Generator, *, keep: float = 0.0) -> list[Tensor]:
    """Add every adapter to its base weight and start a new one: A uniform as nn.Linear's weight, B zero; M zero.

    Args:
        model: one with LoRA or MoRA.
        gen: what A is drawn from, on the CPU.
        keep: LoRA: mu, the share of B that stays where it is, with the A that belongs to it; see `plora`.

    Returns:
        The factors, the same parameters as before.
    """
    factors: list[Tensor] = []
    for layer in model.modules():
        if isinstance(layer, MoRALinear):
            factors += [layer.restart_()]
        elif isinstance(layer, LoraLayer):
            weight, delta = layer.get_base_layer().weight, layer.get_delta_weight(ADAPTER)
            weight.copy_(weight.float() + (1 - keep) * delta.float())  # in fp32; a weight in bf16 rounds once
            A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # (r, in), (out, r)
            B.mul_(keep)
            if keep == 0:
                bound = A.shape[1] ** -0.5
                A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=gen))
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


def jagged(multiplier: Multiplier, *, every: int, warmup: int) -> Multiplier:
    """Return a learning rate multiplier that follows another one, with a linear warm-up after every merge.

    With w = warmup, K = every and k the steps since the last merge (the first K steps have none): k / w times
    the multiplier at the end of this warm-up where k < w, else the multiplier itself.
    """

    def with_restarts(step: float) -> float:
        since = step % every
        if step < every or since >= warmup:
            return multiplier(step)
        return since / warmup * multiplier(step - since + warmup)

    return with_restarts


def chained(multiplier: Multiplier, *, every: int, total: int) -> Multiplier:
    """Return a learning rate multiplier that goes through the whole of another one every `every` of `total` steps."""

    def with_restarts(step: float) -> float:
        since = step % every if step < total else every
        return multiplier(since * total / every)

    return with_restarts
