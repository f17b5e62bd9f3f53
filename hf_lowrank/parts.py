"""The three kinds of parts a method is made of, and what they are told at a step.

A part is a frozen dataclass: its fields are its hyper-parameters and its options; its methods are the mathematics. It
holds no state: it declares the tensors it owns (`slots`), the engine allocates and saves them and hands them back as
`s`.

Legend: W weight, G gradient, both seen wide (..., m, n), short side first · P basis (..., m, r) · R = P^T G (..., r,
n) · M, V moments · N direction before bias correction (..., r, n) · C = P_new^T P_old change of basis (..., r, r).
Functions that end in an underscore write in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_lowrank import linalg
from hf_lowrank.formats import Slot, Slots, State


_SUBSPACE, _ROUNDING = 0, 1  # keep the streams of the two uses apart


@dataclass(frozen=True)
class Context:
    """What a part may know of the current step of one parameter.

    Attributes:
        step: updates that this parameter has had before this one.
        moment_step: t of the bias correction: updates of the moments, this one included.
        refreshes: bases chosen before this one.
        lr, beta1, beta2, eps, weight_decay: the group's values at this step.
        scale: the factor alpha on the low-rank update.
        correct_bias: whether Adam's bias correction is applied.
        stochastic_rounding: how weights of low precision are written.
        orthonormal: whether the stored basis is orthonormal; a quantised one is so only nearly.
        full_rank: whether r is the short side, so that nothing lies outside the subspace.
        key: (seed, index of the parameter in group order).
        offset: where this process's piece of the weight starts.
    """

    step: int
    moment_step: int
    refreshes: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    scale: float
    correct_bias: bool
    stochastic_rounding: bool
    orthonormal: bool
    full_rank: bool
    key: tuple[int, int]
    offset: int

    def generator(self) -> torch.Generator:
        """Return the CPU generator of this refresh, keyed by (seed, parameter, refresh number)."""
        return linalg.generator(_SUBSPACE, *self.key, self.refreshes)

    def rounding(self, device: torch.device) -> torch.Generator | None:
        """Return the generator of this step's stochastic rounding, keyed by (seed, parameter, step), or None."""
        return (
            linalg.generator(_ROUNDING, *self.key, self.step, self.offset, device=device)
            if self.stochastic_rounding
            else None
        )


@dataclass(frozen=True)
class Update:
    """A step U = P Z + G diag(d), to be subtracted from the weight times lr and the bias correction.

    Attributes:
        Z: (..., r, n) coefficients in the subspace, or None.
        d: (..., n) factor of every column of the gradient, or None.
    """

    Z: Tensor | None
    d: Tensor | None = None


class Part:
    """Registry by name; a class without a name is abstract."""

    registry: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, *, name: str | None = None) -> None:
        if name is None:
            cls.registry = {}
        elif cls.registry.setdefault(name, cls).__qualname__ != cls.__qualname__:
            raise TypeError(f"two parts are named {name!r}")


class Subspace(Part, ABC):
    """Where the moments live: how a basis is chosen, kept and used.

    Attributes:
        on_refresh: what the paper does with the moments at a refresh (methods.TRANSPORTS).
    """

    on_refresh: ClassVar[str] = "keep"

    def slots(self, batch: tuple[int, ...], m: int, n: int, r: int) -> Slots:
        """Declare the state; the default is one stored basis that starts as the first r axes."""
        return {"basis": Slot((*batch, m, r), "basis", axes=True)}

    @abstractmethod
    def choose(self, G: Tensor, P: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """Choose a new orthonormal basis.

        Args:
            G: finite gradient (..., m, n); slices that are zero are ignored afterwards.
            P: the basis so far (..., m, r); the first r axes if `ctx.refreshes == 0`.
            ctx: the step.

        Returns:
            The basis (..., m, r) with any signs, and the largest singular values of G, descending, where known.
        """

    def refresh_(self, s: State, G: Tensor, ctx: Context) -> Tensor | None:
        """Replace the basis; return the singular values of G where the rule knows them."""
        P, sigma = self.choose(G, s["basis"], ctx)
        s["basis"].copy_(linalg.align_signs(P, s["basis"] if ctx.refreshes else None))
        return sigma

    def interval(self, s: State, gap: int) -> int:
        """Return the number of steps to the next refresh; the default is the group's update_proj_gap."""
        return gap

    def change(self, s: State, old: State) -> Tensor:
        """Return C = P_new^T P_old (..., r, r)."""
        return s["basis"].mT @ old["basis"]

    def rows(self, s: State, take: Callable[[Tensor], Tensor]) -> State:
        """Return the state for some rows of the matrix, as `project` and `write_` want it; `take` picks them."""
        return ChainMap({"basis": take(s["basis"])}, s)  # type: ignore[arg-type]

    def project(self, s: State, G: Tensor) -> Tensor:
        """Return R (..., r, n) in fp32."""
        return linalg.project(s["basis"], G)

    def write_(self, s: State, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        """W <- beta W + alpha P Z for any block of columns of an fp32 weight."""
        linalg.add_product_(W, s["basis"], Z, beta=beta, alpha=alpha)


class Moments(Part, ABC):
    """The running statistics, and the direction that they give.

    Attributes:
        elementwise: whether every element of a dense tensor is stepped for itself, so that pieces may be stepped
            alone.
    """

    elementwise: ClassVar[bool] = False

    @abstractmethod
    def slots(self, shape: tuple[int, ...]) -> Slots:
        """Declare the state for a gradient (projected or dense) of this shape, the count `moment_step` aside."""

    @abstractmethod
    def update(self, s: State, R: Tensor, ctx: Context) -> Tensor:
        """Take R into the moments, in place, and return the direction N before bias correction (a new tensor)."""

    @abstractmethod
    def step_scale(self, ctx: Context) -> float:
        """Return c_t, the bias correction of the whole step."""

    @abstractmethod
    def transport_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        """Carry the moments from the old basis to the new one as `how` says (methods.TRANSPORTS)."""

    def dense_step_(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], contexts: Sequence[Context]
    ) -> None:
        """Step fp32 tensors that have no subspace, of one group; the default is `update`, one tensor at a time."""
        for W, G, s, ctx in zip(weights, grads, states, contexts, strict=True):
            N = self.update(s, G, ctx)
            W.mul_(1 - ctx.lr * ctx.weight_decay).sub_(N, alpha=ctx.lr * self.step_scale(ctx))


class Reconstruction(Part, ABC):
    """From the direction in the subspace to the step of the whole matrix.

    Attributes:
        needs_gradient: whether the step has a part G diag(d), so that G must live until the weight is written.
    """

    needs_gradient: ClassVar[bool] = False

    def slots(self, batch: tuple[int, ...], m: int, n: int, r: int) -> Slots:
        """Declare the state; the default is none."""
        return {}

    @abstractmethod
    def combine(
        self, s: State, norms: Callable[[], Tensor], R: Tensor, N: Tensor, c_t: float, ctx: Context
    ) -> Generator[Tensor, Tensor, Update]:
        """Return the step in units of lr c_t.

        A generator: where columns of R are held by other processes, it yields what is to be summed over all columns
        and is sent the sum, so that the sums of many matrices travel together.

        Args:
            s: the state.
            norms: gives ||G_j||^2 of the columns (..., n) that R holds.
            R: the projected gradient (..., r, n).
            N: the direction (..., r, n); may be overwritten.
            c_t: the bias correction.
            ctx: the step.
        """
