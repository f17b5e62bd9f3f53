"""The layerwise mode: gradients are taken and freed during backward, by hooks, before the next one comes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from hf_lowrank.engine import step
from hf_lowrank.engine.dense import DenseStep
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.methods.resolve import Config


Take = Callable[[Tensor], None]
_hooks: MutableMapping[Tensor, tuple[weakref.ref[Layerwise], Any]] = WeakIdKeyDictionary()
"""By parameter: (reference to the mode of an optimizer, handle) of the hook it has from us."""


class Layerwise:
    """What the mode has taken since the last step: steps that wait for it, and those that are done.

    Methods that need the gradient at the write (Fira) are stepped in the hook; any other waits with what it projected.
    """

    def __init__(self) -> None:
        self.waiting: dict[Tensor, MatrixStep] = {}
        self.stepped: set[Tensor] = set()

    def forget(self) -> None:
        """Drop what was taken."""
        for unit in self.waiting.values():
            unit.started = None
        self.waiting.clear()
        self.stepped.clear()

    def take_(
        self, unit: MatrixStep, refresh_: Callable[[Sequence[MatrixStep], Mapping[step.Unit, Sequence[bool]]], None]
    ) -> None:
        """Take the gradient of one matrix and free it; one whose refresh is due is left for the optimizer's step.

        Raises:
            RuntimeError: for a second gradient of a matrix that has been stepped.
        """
        weight, in_hook = unit.weight, unit.keeps_gradient
        if in_hook:
            self._once(weight, unit.config.method)
        due, first = unit.due(after=False), unit.stored["refreshes"] == 0
        if due and not first and not in_hook:
            return
        if due and unit.started is None:  # the first basis comes from the first gradient there is
            refresh_([unit], {})
        if in_hook:
            step.update_([unit], {})
            if unit.due(after=True):
                refresh_([unit], {})
        else:
            before, unit.started = unit.started, None
            reading = step.start([unit])
            if before is not None:  # a further micro-batch is added to what was read of those before
                before[1].tensors[0].add_(reading[0])
                unit.started = before
            self.waiting[weight] = unit
        weight.grad = None

    def take_dense_(self, unit: DenseStep) -> None:
        """Step a dense parameter, alone in its unit, and free its gradient.

        Raises:
            RuntimeError: for a second gradient of one that has been stepped.
        """
        (weight,) = unit.weights
        self._once(weight, unit.config.method)
        step.update_([unit], {})
        weight.grad = None

    def _once(self, weight: Tensor, method: str) -> None:
        if weight in self.stepped:
            raise RuntimeError(
                f"{method} updates a weight as soon as its gradient is there, and a second one came "
                "before step(): set gradient_accumulation_steps=1, or leave out layerwise"
            )
        self.stepped.add(weight)

    def attach(self, groups: Sequence[Mapping[str, Any]], configs: Sequence[Config], take: Take) -> None:
        """Give every matrix of a layerwise group a hook, and every dense parameter whose method steps in the hook;
        remove those that another optimizer of ours left, or this one before an edit.

        A hook holds no reference that would keep the optimizer alive.

        Args:
            groups: all parameter groups.
            configs: what they were resolved to.
            take: the optimizer's method that is called with the parameter.

        Raises:
            ValueError: under DistributedDataParallel, whose reduction comes after the hooks.
        """
        for group, config in zip(groups, configs, strict=True):
            wanted = group["layerwise"] and (config.low_rank or config.parts.needs_gradient)
            for p in group["params"]:
                owner, handle = _hooks.get(p, (None, None))
                if wanted and owner is not None and owner() is self:
                    continue
                if handle is not None:
                    handle.remove()
                    del _hooks[p]
                if wanted and p.requires_grad:
                    _refuse_replicas(p)
                    hook = partial(_on_gradient, weakref.WeakMethod(take))
                    _hooks[p] = weakref.ref(self), p.register_post_accumulate_grad_hook(hook)

    def detach(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Take the hooks off again, so that another optimizer finds the gradients."""
        for group in groups:
            for p in group["params"]:
                owner, handle = _hooks.get(p, (None, None))
                if owner is not None and handle is not None and owner() is self:
                    handle.remove()
                    del _hooks[p]


def _on_gradient(take: weakref.WeakMethod[Any], p: Tensor) -> None:
    """Hand the gradient over, unless the optimizer is gone."""
    method = take()
    if method is not None and p.grad is not None:
        method(p)


def _refuse_replicas(p: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not isinstance(p, DTensor):
        raise ValueError(
            "layerwise does not run under DistributedDataParallel, which reduces gradients after they are freed: "
            "use FSDP2, or leave out layerwise"
        )
