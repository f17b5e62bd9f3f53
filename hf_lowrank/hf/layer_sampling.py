"""LayerSampling: a callback that trains some layers of a model at a time, with any optimizer of Trainer."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hf_lowrank.engine.checkpoint import AFRESH, warn_kept
from hf_lowrank.engine.collectives import replicas
from hf_lowrank.hf.arguments import unwrapped
from hf_lowrank.hf.outliers import calibration_batches, outlier_shares
from hf_lowrank.layer_sampling import OPTION, RULES, Layers, Rule, rule_of, take
from hf_lowrank.methods.options import split_assignments
from hf_lowrank.optimizer import LowRankOptimizer


logger = logging.getLogger("hf_lowrank")
SAVED = "hf_lowrank_layers"
"""Key of what the callback keeps in trainer_state.json."""


class LayerSampling(TrainerCallback):  # type: ignore[misc]
    """Trains some layers of a model at a time: BAdam, LISA or OwLore, with any optimizer of Trainer.

    Gradients of all other layers are neither computed nor kept, and the optimizer holds no state for them: that of
    layers that leave is dropped, that of layers that enter is made anew. Other layers are chosen every `switch_every`
    steps of the optimizer, not of accumulation, by args.seed and the step alone, so that a resumed run and all
    processes choose the same ones; of a resumed run the checkpoint's rule, options and seed count. What was frozen
    when the optimizer was built stays so.

    Args:
        layer_sampling: "badam", "lisa" or "owlore", or one of the rules (`hf_lowrank.layer_sampling.RULES`).
        options: those of a rule that is given by its name, such as switch_every=50.

    Raises:
        ValueError: for a rule or an option that does not exist; when training begins, for a model without a list of
            layers, with fewer than are to be trained at once, and under FSDP and DeepSpeed.

    Example:
        >>> callback = LayerSampling("lisa", switch_every=20, sampled_layers=2)
    """

    def __init__(self, layer_sampling: str | Rule, **options: Any) -> None:
        self.by_arguments = False  # whether optim_args have asked for it, for one training
        self.rule = layer_sampling if isinstance(layer_sampling, Rule) else rule_of(layer_sampling, options)
        self.layers: Layers | None = None  # while a training runs
        self.seed = 0  # of the training
        self.shares: list[float] = []
        self._undo: dict[str, Callable[[], None]] = {}  # what is to be taken off the model again

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the layers, and train those of the first step."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        params = [p for group in optimizer.param_groups for p in group["params"]]
        _refuse_unsupported(args, params)
        if state.global_step and SAVED not in state.stateful_callbacks:
            raise ValueError(
                f"the checkpoint says nothing of {OPTION}, as one of a run that trained all layers, and this run has "
                f"{OPTION}={self.rule.name}: leave that out, or {AFRESH}"
            )
        rule, self.seed = _as_begun(self.rule, args.seed, state)
        self.layers = Layers(model, params, rule)
        if rule.by_outliers:
            self.shares = _shares(self.layers, args, state, model, kwargs["train_dataloader"])
        chosen = self._follow(state, model, optimizer)
        switches = -(-state.max_steps // rule.switch_every)
        reached, count = switches * rule.sampled_layers, len(self.layers.members)
        if state.is_world_process_zero and reached < count:
            logger.warning(
                "%s=%s: in %d steps at most %d of %d layers train: other layers come every switch_every=%d steps",
                *(OPTION, rule.name, state.max_steps, reached, count, rule.switch_every),
            )
        if state.is_world_process_zero:
            logger.info("%s: %d layers, of which %s train now", rule, len(self.layers.members), chosen)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Train other layers, if it is time: before the first micro-batch of a step."""
        if self.layers is not None and state.global_step % self.layers.rule.switch_every == 0:
            self._follow(state, kwargs["model"], kwargs["optimizer"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have everything require a gradient again that did before."""
        self.wake()

    def wake(self) -> None:
        """Have all that is trained require a gradient, and take the hooks off."""
        while self._undo:
            self._undo.popitem()[1]()
        if self.layers is not None:
            self.layers.wake_()
            self.layers = None

    def _follow(self, state: Any, model: Any, optimizer: Any) -> list[int]:
        """Train the layers of this step, and return which they are."""
        assert self.layers is not None
        step, rule = state.global_step, self.layers.rule
        chosen = self.layers.chosen(step, self.seed, self.shares)
        left = self.layers.require_(chosen)
        if rule.restarts and step % rule.switch_every == 0:
            left = list({*left, *self.layers.inside})
        _forget(optimizer, left)
        if "inputs" not in self._undo and _behind_frozen_embeddings(model):
            model.enable_input_require_grads()
            self._undo["inputs"] = model.disable_input_require_grads
        if replicas() is not None:
            self._undo.pop("buffers", lambda: None)()
            self._undo["buffers"] = _reduce_what_trains(model)
        return chosen


def _as_begun(rule: Rule, seed: int, state: Any) -> tuple[Rule, int]:
    """Return a rule and a seed, or those with which the run began that is resumed, and keep them for its checkpoints.

    Warns of each that is given otherwise.
    """
    given = {OPTION: rule.name, "seed": seed, **asdict(rule)}
    begun = state.stateful_callbacks.setdefault(SAVED, {}).setdefault("begun", given)
    for key, value in begun.items():
        if key in given and given[key] != value and state.is_world_process_zero:
            warn_kept(key, given[key], value)
    options = {key: value for key, value in begun.items() if key not in (OPTION, "seed")}
    return RULES[begun[OPTION]](**options), begun["seed"]


def _refuse_unsupported(args: Any, params: Collection[Tensor]) -> None:
    """Refuse what settles which weights require a gradient when it wraps a model."""
    launched = AcceleratorState._shared_state.get("distributed_type")
    wrapped = launched in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if wrapped or getattr(args, "deepspeed", None) or any(isinstance(p, DTensor) for p in params):
        raise ValueError(
            f"{OPTION} does not run under FSDP or DeepSpeed, which settle once which weights require a gradient: "
            "train under DDP, or on one device"
        )


def _forget(optimizer: Any, params: Collection[Tensor]) -> None:
    """Drop the state of what is not trained now; optimizers of ours keep their counters."""
    inner = unwrapped(optimizer)
    if isinstance(inner, LowRankOptimizer):
        inner.forget(params)
        return
    for p in params:
        inner.state.pop(p, None)


def _behind_frozen_embeddings(model: Any) -> bool:
    """Tell whether reentrant checkpoints of activations would pass no gradient on, as their inputs require none."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None or any(p.requires_grad for p in embeddings.parameters()):
        return False
    checkpoints = (getattr(module, "_gradient_checkpointing_func", None) for module in model.modules())
    reentrant = any(c is not None and getattr(c, "keywords", {}).get("use_reentrant", True) for c in checkpoints)
    return reentrant and not getattr(model, "_require_grads_hook", None)


def _reduce_what_trains(model: nn.Module) -> Callable[[], None]:
    """Have DistributedDataParallel reduce the gradients that there are now, and hold buffers for no others.

    It settles that when it is built, and when it is unpickled, which is what it is told to do here: right before it is
    called next, since nothing that a callback is given knows it.

    Returns:
        What calls that off.
    """

    def renew(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, DistributedDataParallel) and module.module is model:
            handle.remove()
            hooks = list(module._comm_hooks)
            module.__setstate__(module.__getstate__())  # type: ignore[no-untyped-call]
            module._comm_hooks = []  # what has been built anew has none
            for hook, held in hooks:
                module.register_comm_hook(held, hook)

    handle = register_module_forward_pre_hook(renew)
    return handle.remove


def _shares(layers: Layers, args: Any, state: Any, model: nn.Module, loader: Any) -> list[float]:
    """Return the shares of outliers: those of the checkpoint, or measured now and sent by the first process to all."""
    saved = state.stateful_callbacks[SAVED]
    if "shares" not in saved:
        measured = [outlier_shares(layers, model, calibration_batches(loader, args, layers.rule))]
        if replicas() is not None:
            dist.broadcast_object_list(measured)
        saved["shares"] = measured[0]
    shares: list[float] = saved["shares"]
    if (positive := sum(share > 0 for share in shares)) < layers.rule.sampled_layers:
        raise ValueError(
            f"{positive} of {len(shares)} layers have outliers, and sampled_layers={layers.rule.sampled_layers} are "
            "drawn among those: choose a smaller outlier_threshold"
        )
    return shares


def refuse_dropped(trainer: Any, checkpoint: str) -> None:
    """Refuse to go on with all layers where a checkpoint is of a run that trained some of them at a time."""
    file = Path(checkpoint) / TRAINER_STATE_NAME
    state = json.loads(file.read_text()) if file.exists() else {}  # Trainer begins at step 0 without it
    begun = (state.get("stateful_callbacks") or {}).get(SAVED, {}).get("begun")
    if begun and not any(isinstance(callback, LayerSampling) for callback in trainer.callback_handler.callbacks):
        raise ValueError(
            f"the checkpoint is of a run with {OPTION}={begun[OPTION]}, and this one trains all layers: give it the "
            f"same, or {AFRESH}"
        )


def sample_layers(trainer: Any) -> None:
    """Give a Trainer the callback that its optim_args ask for.

    Raises:
        ValueError: where it has another one already.
    """
    text = trainer.args.optim_args or ""
    rule = take(split_assignments(text)) if "=" in text else None
    if rule is None:
        return
    callbacks = trainer.callback_handler.callbacks
    present = [callback.rule for callback in callbacks if isinstance(callback, LayerSampling)]
    if not present:
        callbacks.insert(1, asked := LayerSampling(rule))  # behind what steers the loop, before all that report
        asked.by_arguments = True
    elif present != [rule]:
        raise ValueError(f"{OPTION} is given twice, by optim_args and by a callback: leave out one of them")


def wake_layers(trainer: Any) -> None:
    """Undo what a training that ended in an error has frozen, and what its arguments have added."""
    callbacks = trainer.callback_handler.callbacks
    for callback in [callback for callback in callbacks if isinstance(callback, LayerSampling)]:
        callback.wake()
        if callback.by_arguments:
            callbacks.remove(callback)


def for_any_optimizer(args: TrainingArguments) -> TrainingArguments:
    """Return training arguments whose optim_args say nothing of layer sampling, which other optimizers do not know."""
    if "=" not in (args.optim_args or ""):
        return args
    options: dict[str, Any] = split_assignments(args.optim_args)
    given = len(options)
    take(options)
    if len(options) == given:
        return args
    without = copy.copy(args)
    without.optim_args = ",".join(f"{key}={value}" for key, value in options.items()) or None
    return without
