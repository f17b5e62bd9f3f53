"""The layerwise mode: gradients are taken and freed during backward, by hooks, before the next one comes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_lowrank.engine import step
from hf_lowrank.engine.averaging import average_gradients_
from hf_lowrank.engine.collectives import replicas
from hf_lowrank.engine.dense import DenseStep
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.engine.offload import Offloaded
from hf_lowrank.engine.sharding import check_replicas
from hf_lowrank.engine.unit import Unit
from hf_lowrank.methods.resolve import Config


T = TypeVar("T")
Take = Callable[[Tensor], None]
Refresh = Callable[[Sequence[MatrixStep], Mapping[Unit, Sequence[bool]]], None]
_modes: weakref.WeakSet[Layerwise] = weakref.WeakSet()
"""Of every optimizer that has, or had, hooks."""


class _Hook(NamedTuple):
    """A hook on a parameter, and the address of the tensor behind it: torch may swap that (`Module.to` of FSDP2's
    modules), and no hook is called any more."""

    handle: RemovableHandle
    behind: int


class Layerwise:
    """What the mode has taken since the last step: steps that wait for it, and those that are done.

    Methods that need the gradient at the write (Fira) are stepped in the hook; any other waits with what it projected.
    Where a gradient is needed whole at the step, because the groups say so (layerwise=offload) or replicas are to
    average it for a refresh, it waits in host memory.
    """

    def __init__(self) -> None:
        self.waiting: dict[Tensor, MatrixStep] = {}
        self.stepped: set[Tensor] = set()
        self.offloaded = Offloaded()
        self._hooks: dict[Tensor, _Hook] = {}
        weakref.finalize(self, _remove, self._hooks)

    def forget(self, units: Iterable[Unit] = ()) -> None:
        """Drop what was taken, and steps of other units that were started."""
        for unit in (*self.waiting.values(), *units):
            unit.forget()
        self.waiting.clear()
        self.stepped.clear()
        self.offloaded.forget()

    def drop(self, weights: Iterable[Tensor]) -> None:
        """Drop the steps of some weights that wait."""
        for weight in weights:
            if weight in self.waiting:
                self.waiting.pop(weight).forget()

    def hand_over(self, units: Mapping[Tensor, Unit]) -> None:
        """Give the steps that wait to the units that are in the place of theirs, after an edit of the groups."""
        for weight, unit in [*self.waiting.items()]:
            now = units.get(weight)
            if not isinstance(now, MatrixStep):
                self.drop([weight])
            elif now is not unit:
                now.take_over_(unit)
                self.waiting[weight] = now

    @property
    def begun(self) -> bool:
        """Whether a hook has taken something since the last step."""
        return bool(self.waiting or self.stepped or len(self.offloaded))

    def take_(self, unit: MatrixStep, refresh_: Refresh) -> None:
        """Take the gradient of one matrix and free it.

        Unless the method steps here it is left for the optimizer's step, with what comes after it, where a refresh is
        due that is not the first, or where a first one found nothing in it.

        Raises:
            RuntimeError: for a second gradient of a matrix that has been stepped.
        """
        weight, in_hook = unit.weight, unit.keeps_gradient
        if unit.config.offloads or (unit.reduced and unit.due(after=False)):
            self.offloaded.take_(weight)
            return
        if in_hook:
            self._once(weight, unit.config.method)
        due, first = unit.due(after=False), unit.stored["refreshes"] == 0
        if due and not first and not in_hook:
            return
        flags = step.foreseen([unit]) if due or in_hook else {}
        if due and unit.started is None:  # the first basis comes from the first gradient there is
            refresh_([unit], flags)
            if not in_hook and unit.stored["refreshes"] == 0:  # it is zero so far: what comes is added to it
                return
        if in_hook:
            step.update_([unit], flags)
            if unit.due(after=True):
                refresh_([unit], flags)
        else:
            before, unit.started = unit.started, None
            reading = step.start([unit])
            if before is not None:  # a further micro-batch is added to what was read of those before
                before[1].tensors[0].add_(reading[0])
                unit.started = before
            unit.rest()
            self.waiting[weight] = unit
        weight.grad = None

    def take_dense_(self, unit: DenseStep) -> None:
        """Step a dense parameter, alone in its unit, and free its gradient.

        Raises:
            RuntimeError: for a second gradient of one that has been stepped.
        """
        (weight,) = unit.weights
        if unit.config.offloads:
            self.offloaded.take_(weight)
            return
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

    def average_due_(self, units: Sequence[MatrixStep], refresh_: Refresh) -> None:
        """Average the gradients that refreshes are to look at, of replicas that otherwise average what they project.

        Those that wait in host memory are used up at once, as many at a time as there are processes to choose bases.

        Args:
            units: all matrices.
            refresh_: the optimizer's method.
        """
        due = [unit for unit in units if unit.local and unit.started is None and unit.due(after=False)]
        average_gradients_([unit for unit in due if not unit.config.hooked])
        for some in _waves([unit for unit in due if unit.config.hooked]):
            for unit in some:
                self.offloaded.bring_back_(unit.weight)
            average_gradients_(some)
            there = [unit for unit in some if not unit.local]
            refresh_(there, step.foreseen(there))
            step.start(there)
            for unit in there:
                unit.weight.grad = None

    def step_offloaded_(
        self, units: Mapping[Tensor, MatrixStep | DenseStep], refresh_: Refresh, max_norm: float
    ) -> float | None:
        """Step what has its gradient in host memory, a few at a time.

        Args:
            units: all that may have one there, by weight.
            refresh_: the optimizer's method.
            max_norm: what the global norm of these gradients is clipped to; 0: not at all.

        Returns:
            That norm, where it is looked at.
        """
        for weight in units:
            if weight.grad is not None:  # a hook has not seen it
                self.offloaded.take_(weight)
        some = [(weight, unit) for weight, unit in units.items() if weight in self.offloaded]
        norm, factor = self.offloaded.clipping([(w, unit.pieces) for w, unit in some], max_norm)
        for wave in _waves(some):
            for weight, _ in wave:
                self.offloaded.bring_back_(weight, factor)
            now = [unit for _, unit in wave]
            matrices = [unit for unit in now if isinstance(unit, MatrixStep)]
            flags = step.foreseen(now)
            refresh_([unit for unit in matrices if unit.due(after=False)], flags)
            step.update_(now, flags)
            refresh_([unit for unit in matrices if unit.due(after=True)], flags)
            for weight, _ in wave:
                weight.grad = None
        return norm

    def attach(self, groups: Sequence[Mapping[str, Any]], configs: Sequence[Config], take: Take) -> None:
        """Give every parameter that the mode takes a hook: matrices, and all where the method steps in the hook;
        remove those that another optimizer of ours left, or this one before an edit.

        A hook holds no reference that would keep the optimizer alive.

        Args:
            groups: all parameter groups.
            configs: what they were resolved to.
            take: the optimizer's method that is called with the parameter.

        Raises:
            ValueError: under DistributedDataParallel where it reduces these weights too, after the hooks.
        """
        others = [mode for mode in _modes if mode is not self]
        for group, config in zip(groups, configs, strict=True):
            config = config.with_(layerwise=group["layerwise"])  # as it was edited to be
            if wanted := config.hooked:
                check_replicas(group, config)
            for p in group["params"]:
                for mode in others if wanted else (*others, self):
                    _remove(mode._hooks, p)
                if p in self._hooks and self._hooks[p].behind != p._cdata:
                    _remove(self._hooks, p)
                    p._post_accumulate_grad_hooks = None  # what is registered in that dict would never be called
                if wanted and p.requires_grad and p not in self._hooks:
                    hook = partial(_on_gradient, weakref.WeakMethod(take))
                    self._hooks[p] = _Hook(p.register_post_accumulate_grad_hook(hook), p._cdata)
                    _modes.add(self)

    def detach(self) -> None:
        """Take the hooks off again, so that another optimizer finds the gradients."""
        self.offloaded = Offloaded()
        _remove(self._hooks)


def _remove(hooks: dict[Tensor, _Hook], *some: Tensor) -> None:
    """Take hooks off: those of some parameters, or all."""
    for p in some or [*hooks]:
        if p in hooks:
            hooks.pop(p).handle.remove()


def _on_gradient(take: weakref.WeakMethod[Any], p: Tensor) -> None:
    """Hand the gradient over, unless the optimizer is gone."""
    method = take()
    if method is not None and p.grad is not None:
        method(p)


def _waves(some: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield as many at a time as there are processes that share the work of their refreshes."""
    together = dist.get_world_size() if replicas() is not None else 1
    for i in range(0, len(some), together):
        yield some[i : i + together]
