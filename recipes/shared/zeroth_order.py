"""Fine-tuning without a backward pass: MeZO, LOZO and SubZero, as a Trainer.

Two losses at W + eps Z and W - eps Z give c = (L+ - L-) / (2 eps), the slope along a random Z, and the step is
W <- (1 - lr wd) W - lr c Z. In expectation c Z is the gradient. Z is not stored but drawn again from its key, so the
memory is that of inference, with one copy of the weights beside it (none with --zo_in_place).

These estimates have the noise of a random direction among all weights: they fine-tune what is nearly right, in many
steps, and are useless for pretraining.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_lowrank.tensors.random import generator, uniform_stiefel


Key = tuple[int, int, int]
"""(seed, step, micro-step): what a direction follows from, the same on every process and in a run that is resumed."""

Draw = Callable[[Key, int, torch.Size, torch.device], Tensor]
"""From a key, the number of a parameter, its shape and its device to Z in fp32, with E[Z Zᵀ] = I over its entries."""


def full(key: Key, number: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Return Z ~ N(0, I): MeZO (arXiv 2305.17333, Algorithm 1)."""
    return torch.randn(shape, generator=generator(*key, number, device=device), device=device)


def lozo(*, rank: int, every: int) -> Draw:
    """Return the drawing of Z = U Vᵀ / sqrt(r), U (m, r) new at every step, V (n, r) every `every` (arXiv 2410.07698).

    Differs from the authors' code: there the estimate is r times the gradient, and at a step with a new V the weights
    move along another direction than the one that was measured. The paper's eps is ours over sqrt(r): entries have
    the variance 1 here, so that eps and lr mean what they mean for MeZO. What is no matrix has MeZO's Z. There is no
    momentum.
    """

    def draw(key: Key, number: int, shape: torch.Size, device: torch.device) -> Tensor:
        if len(shape) != 2:
            return full(key, number, shape, device)
        r = min(rank, *shape)
        U = full(key, number, torch.Size((shape[0], r)), device)
        V = full((key[0], key[1] // every, -1), number, torch.Size((shape[1], r)), device)  # -1: no micro-step
        return U @ V.T / r**0.5

    return draw


def subzero(*, rank: int, every: int) -> Draw:
    """Return the drawing of Z = sqrt(m n) / r U Xi Vᵀ, with Xi ~ N (r, r) new at every step (arXiv 2410.08989).

    U (m, r) and V (n, r) are orthonormal and new every `every` steps. Differs from the authors' code: one step for
    all parameters, bases that are drawn again and not kept, and matrices of adapters in their own shape.
    """

    def draw(key: Key, number: int, shape: torch.Size, device: torch.device) -> Tensor:
        if len(shape) != 2:
            return full(key, number, shape, device)
        r, kept = min(rank, *shape), (key[0], key[1] // every, -1)
        U, V = (
            uniform_stiefel(torch.Size((length, r)), generator(*kept, number, side, device=device), device)
            for side, length in enumerate(shape)
        )
        return U @ full(key, number, torch.Size((r, r)), device) @ V.T * (prod(shape) ** 0.5 / r)

    return draw


class ZerothOrderSGD(torch.optim.Optimizer):
    """W <- (1 - lr wd) W - lr (sum of c Z), for the slopes (key, c) in `measured`. It has no state.

    Args:
        params: groups of parameters; their order gives every one its number.
        lr: rate.
        weight_decay: wd.
        draw: what directions are drawn by.
    """

    def __init__(self, params: Iterable[Any], lr: float, *, weight_decay: float = 0.0, draw: Draw = full) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.draw = draw
        self.measured: list[tuple[Key, float]] = []

    def parameters(self) -> Iterator[tuple[int, nn.Parameter, dict[str, Any]]]:
        """Yield number, parameter and group."""
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        yield from ((number, p, group) for number, (p, group) in enumerate(pairs))

    def direction(self, key: Key, number: int, p: Tensor) -> Tensor:
        """Return Z of a parameter in fp32."""
        return self.draw(key, number, p.shape, p.device)

    @torch.no_grad()
    def move_(self, key: Key, distance: float, start: list[Tensor] | None = None) -> None:
        """Set W <- start + distance Z, rounded once; without `start` from where W is."""
        for number, p, _ in self.parameters():
            base = p if start is None else start[number]
            p.copy_(base.float().add(self.direction(key, number, p), alpha=distance))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step along all that has been measured, and forget it."""
        for number, p, group in self.parameters():
            new = p.float() * (1 - group["lr"] * group["weight_decay"])
            for key, slope in self.measured:
                new.add_(self.direction(key, number, p), alpha=-group["lr"] * slope)
            p.copy_(new)
        self.measured.clear()


class ZerothOrderTrainer(Trainer):
    """A Trainer whose step is two forward passes: no gradient, no dropout, two numbers between processes.

    The weights are copied before they are moved, and are bit for bit what they were when they are moved back. Data,
    schedule, accumulation, decay, checkpoints and DDP are Trainer's; a run resumes bit for bit, with nothing saved,
    since all randomness follows from (seed, step).

    Args:
        model, args, others: as for Trainer.
        draw: full, lozo(...) or subzero(...).
        eps: length of the moves; entries of Z have the variance 1.
        in_place: move the weights to and fro without a copy, as the paper does. What they are is not restored exactly:
            in fp32 they drift by 6e-7 of their norm in a hundred steps.

    Raises:
        ValueError: for arguments that this cannot honour.
    """

    def __init__(
        self, model: nn.Module, args: TrainingArguments, *, draw: Draw, eps: float, in_place: bool, **others: Any
    ) -> None:
        check(model, args, eps=eps, in_place=in_place)
        options = {"lr": args.learning_rate, "draw": draw}
        super().__init__(model, args, **others | {"optimizer_cls_and_kwargs": (ZerothOrderSGD, options)})
        self.eps = eps
        self.in_place = in_place

    @torch.no_grad()
    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Measure the slope along one direction; return the mean of the two losses."""
        optimizer: ZerothOrderSGD = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        key = (self.args.seed, self.state.global_step, len(optimizer.measured))
        self.model.eval()
        inputs = self._prepare_inputs(inputs)
        start = None if self.in_place else [p.clone() for _, p, _ in optimizer.parameters()]

        def loss_at(distance: float) -> Tensor:
            optimizer.move_(key, distance, start)
            with self.compute_loss_context_manager():
                # not through DDP's wrapper, which would send buffers around
                loss: Tensor = self.compute_loss(self.model, inputs, num_items_in_batch=num_items_in_batch)
            return loss.float()

        losses = [loss_at(self.eps), loss_at(-2 * self.eps if self.in_place else -self.eps)]
        if start is None:
            optimizer.move_(key, self.eps)
        else:
            for _, p, _ in optimizer.parameters():
                p.copy_(start.pop(0))
        if not (self.model_accepts_loss_kwargs and num_items_in_batch is not None):  # else it is a share already
            losses = [loss / self.current_gradient_accumulation_steps for loss in losses]
        both = self.accelerator.reduce(torch.stack(losses), reduction="mean")
        slope = float(both[0] - both[1]) / (2 * self.eps)
        optimizer.measured.append((key, slope if isfinite(slope) else 0.0))
        return both.mean()


def check(model: nn.Module, args: TrainingArguments, *, eps: float, in_place: bool) -> None:
    """Say in a sentence what cannot be honoured."""
    if args.max_grad_norm:
        raise ValueError(
            f"--max_grad_norm {args.max_grad_norm:g} would clip nothing: there are no gradients; set it to 0"
        )
    if not 0 < eps < float("inf"):
        raise ValueError(f"--zo_eps must be above 0 and finite, not {eps:g}")
    if args.fp16 or args.deepspeed or args.fsdp:
        raise ValueError(
            "a zeroth-order step has no gradients to scale or to shard: leave --fp16, --deepspeed and --fsdp out"
        )
    if in_place and args.gradient_accumulation_steps > 1:
        raise ValueError(
            "--zo_in_place moves the weights to and fro for every micro-batch, and they drift: "
            "set --gradient_accumulation_steps 1 or leave it out"
        )
    low = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32, torch.float64}
    if in_place and low:
        raise ValueError(
            f"--zo_in_place wants weights in float32, where moving them to and fro changes nothing to speak of; "
            f"these are in {', '.join(map(str, low))}: leave it out"
        )
