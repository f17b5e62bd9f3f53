"""What is stepped as one, and what its step asks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from types import GeneratorType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.tensors.splits import Team
from hf_lowrank.tensors.sums import Max, Rule, Sum


T = TypeVar("T")
TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of the weights that can be trained."""


class Reading(NamedTuple):
    """What a step asks once: is each of these finite? It is sent a list of answers.

    Attributes:
        tensors: what it has read.
        here: whether this process has a gradient, where replicas read gradients of their own, which are averaged
            first; None where they have averaged the gradients themselves.
    """

    tensors: list[Tensor]
    here: bool | None = None


class Asked(NamedTuple):
    """What a rule asks of the processes that hold other pieces of an axis."""

    request: Sum | Max
    team: Team


Work = Generator[Asked | Reading, Any, T]


class Unit(ABC):
    """What is stepped as one: a matrix, or all dense parameters of a group.

    Attributes:
        started: a step that waits for the answer to its reading.
        device: where the work is done.
        mesh: the mesh on which the weights lie, or None.
        pieces: the processes that hold the pieces of one copy of the weights, or None where each holds all of it.
    """

    started: tuple[Work[None], Reading] | None = None
    device: torch.device
    mesh: Any = None
    pieces: Team | None = None

    @property
    def local(self) -> bool:
        """Whether the gradient is this process's alone, and what is read of it will be averaged over replicas."""
        return False

    @property
    @abstractmethod
    def transient(self) -> int:
        """Elements that a started step keeps: the same number on every process."""

    @abstractmethod
    def look(self) -> list[Tensor]:
        """Return for each answer to the reading what has the norm of this process's gradient."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether there is a gradient, or a step that waits."""

    @abstractmethod
    def marks(self) -> list[int]:
        """Return what processes must agree on of every weight: twice its steps, and one more if it will be stepped."""

    def forget(self) -> None:
        """Drop a step that was started, and what was read of its gradient."""
        self.started = None

    @abstractmethod
    def step_(self) -> Work[None]:
        """Update moments and weights."""


def has_gradient(p: Tensor, shape: torch.Size) -> bool:
    """Tell whether a parameter has a gradient.

    Args:
        p: the parameter.
        shape: what it was when its step was made.

    Raises:
        ValueError: for a sparse gradient, and for a parameter that has changed its shape or has a type that cannot be
            trained.
    """
    if p.shape != shape:
        raise ValueError(
            f"a parameter of shape {tuple(shape)} has become one of shape {tuple(p.shape)}, which its state does not "
            "fit: build a new optimizer after changing the model"
        )
    if p.dtype not in TYPES:
        raise ValueError(f"a parameter has become {p.dtype}; train it in float32, bfloat16 or float16, or freeze it")
    if p.grad is None:
        return False
    if p.grad.layout != torch.strided:
        raise ValueError("sparse gradients are not supported; build the embedding with sparse=False")
    return True


def gradient_of(p: Tensor) -> Tensor:
    """Return a gradient, placed on the mesh as its weight is: torch may leave a sum that was not taken, or a copy."""
    grad = p.grad
    assert grad is not None
    if isinstance(grad, DTensor) and isinstance(p, DTensor) and grad.placements != p.placements:
        grad = p.grad = grad.redistribute(placements=p.placements)
    return grad


def asking(rule: Rule[T], teams: Mapping[str, Team | None]) -> Work[T]:
    """Finish a rule: a sum over an axis that is split over processes is asked for, any other is whole here.

    Args:
        rule: the rule.
        teams: who holds other pieces of each axis.
    """
    if not isinstance(rule, GeneratorType):
        return rule  # type: ignore[return-value]
    answer: Any = None
    while True:
        try:
            asked = rule.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        team = teams.get(asked.over)
        answer = (yield Asked(asked, team)) if team else asked.partial
