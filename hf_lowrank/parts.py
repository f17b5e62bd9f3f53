"""The three kinds of parts a method is made of, and what they are told at a step.

A part is a frozen dataclass: its fields are its hyper-parameters and its options; its methods are the mathematics. It
holds no state: it declares the tensors it owns (`slots`), the engine allocates and saves them and hands them back as
`s`.

Some rules need sums over all columns of a matrix, which may be split over processes. They are generators: they yield
what is to be summed over the columns that are held, and are sent the sum over all; the engine lets the sums of many
matrices travel together.

Legend: W weight, G gradient, both seen wide (..., m, n), short side first · P basis (..., m, r) · R = P^T G (..., r,
n) · M, V moments · N direction before bias correction (..., r, n) · C = P_new^T P_old change of basis (..., r, r).
Functions that end in an underscore write in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from hf_lowrank import linalg
from hf_lowrank.bases import Basis, Dense
from hf_lowrank.formats import Slot, Slots, State
from hf_lowrank.matrices import clamp_rank
from hf_lowrank.methods import TRANSPORTS


T = TypeVar("T")
Summing = Generator[Tensor, Tensor, T]
"""A computation that yields partial sums, is sent the whole ones, and returns a T."""

_SUBSPACE, _ROUNDING, SHARED = 0, 1, 3  # keep the streams of the three uses apart; metrics.py has 2


@dataclass(frozen=True)
class Columns:
    """What the columns of R (its last axis) are.

    Attributes:
        n: how many there are on all processes.
        block: how many adjacent ones belong together because they are the outputs of one neuron (1) or of one head
            (the
            head's size); 0 where they are inputs.
        start: the first one that this process holds.
    """

    n: int
    block: int = 0
    start: int = 0


class Context(NamedTuple):
    """What a part may know of the current step of one parameter.

    Attributes:
        step: updates that this parameter has had before this one.
        moment_step: t of the bias correction: updates of the moments, this one included.
        number: which basis is in use or being chosen: 0 is the first.
        lr, beta1, beta2, eps, weight_decay: the group's values at this step.
        initial_lr: the learning rate that the schedule multiplies.
        scale: the factor alpha on the low-rank update.
        correct_bias: whether Adam's bias correction is applied.
        stochastic_rounding: how weights of low precision are written.
        m, r: rows of the matrix seen wide, and of R; both 0 for a dense parameter.
        rank: the option.
        columns: what the columns of R are.
        split: the axis of the matrix seen wide that is split over processes: rows, columns, batch or nothing.
        key: (seed, index of the parameter in group order).
        offset: where this process's piece of the weight starts.
        device: where the weight is.
    """

    step: int
    moment_step: int
    number: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    initial_lr: float
    scale: float
    correct_bias: bool
    stochastic_rounding: bool
    m: int
    r: int
    rank: float
    columns: Columns
    split: str
    key: tuple[int, int]
    offset: int
    device: torch.device

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Return the generator of this basis, keyed by (seed, parameter, number of the basis)."""
        return linalg.generator(_SUBSPACE, *self.key, self.number, device=device)

    def rounding(self, device: torch.device) -> torch.Generator | None:
        """Return the generator of this step's stochastic rounding, keyed by (seed, parameter, step), or None."""
        return (
            linalg.generator(_ROUNDING, *self.key, self.step, self.offset, device=device)
            if self.stochastic_rounding
            else None
        )


class Facts(NamedTuple):
    """What a reconstruction may ask of the gradient and of the basis.

    Attributes:
        norms: gives ||G_j||^2 of the columns (..., n) that R holds.
        gram: gives P^T P (..., r, r), or None where that is the identity.
    """

    norms: Callable[[], Tensor]
    gram: Callable[[], Tensor | None]

    def inside(self, R: Tensor, r_squared: Tensor) -> Tensor:
        """Return ||P R_j||^2 of every column, (..., n), given ||R_j||^2, which it is for an orthonormal basis."""
        gram = self.gram()
        return r_squared if gram is None else (R * (gram @ R)).sum(-2)


class Update(NamedTuple):
    """A step U = alpha P Z + G diag(d) + rest, to be subtracted from the weight times lr and the bias correction.

    Attributes:
        Z: (..., r, n) coefficients in the subspace, or None.
        alpha: a factor of all of them.
        d: (..., n) factor of every column of the gradient, or None.
        rest: gives any other step of some columns from their gradient, fp32 (..., m, length), and (start, length): for
            rules that act on every element of the gradient.
    """

    Z: Tensor | None = None
    alpha: float = 1.0
    d: Tensor | None = None
    rest: Callable[[Tensor, int, int], Tensor] | None = None


class Part:
    """Registry by key, one for every kind of part; a class without a key is abstract.

    (Not `name`: ABCMeta of Python 3.10 has a parameter of that name itself.)

    Attributes:
        composable: whether the part may be combined freely with others, in the row `lowrank`.
    """

    registry: ClassVar[dict[str, type[Any]]]
    composable: ClassVar[bool] = True

    def __init_subclass__(cls, *, key: str | None = None) -> None:
        if key is None:
            if not hasattr(cls, "registry"):
                cls.registry = {}
        elif cls.registry.setdefault(key, cls).__qualname__ != cls.__qualname__:
            raise TypeError(f"two parts are named {key!r}")


class Subspace(Part, ABC):
    """Where the moments live: how a basis is chosen and kept.

    Attributes:
        on_refresh: what the paper does with the moments at a refresh (methods.TRANSPORTS).
        orthonormal: whether the columns of a new basis are orthonormal.
        late: whether bases after the first are chosen when the weight has been written, for the next step.
        without: common options that mean nothing here and are refused.
        wants: slots of the moments that a refresh looks at.
    """

    on_refresh: ClassVar[str] = "keep"
    orthonormal: ClassVar[bool] = True
    late: ClassVar[bool] = False
    without: ClassVar[tuple[str, ...]] = ()
    wants: ClassVar[tuple[str, ...]] = ()

    @property
    def needs_gradient(self) -> bool:
        """Whether every step looks at the gradient itself, so that it must live until the weight is written."""
        return self.late

    def rank(self, m: int, n: int, rank: float) -> int:
        """Return the number of rows of R for the option `rank`."""
        return clamp_rank(rank, m, n)

    def shape(self, m: int, n: int, r: int) -> tuple[int, int]:
        """Return the shape of R for one matrix."""
        return (r, n)

    def slots(self, batch: tuple[int, ...], m: int, n: int, r: int, piece: tuple[int, int]) -> Slots:
        """Declare the state; the default is one stored basis that starts as the first r axes.

        Args:
            batch, m, n, r: a stack of m x n matrices at rank r, n counting the columns of R that are held.
            piece: (rows, columns) of this process's piece of the gradient: (m, n) unless that is split.
        """
        return {"basis": Slot((*batch, m, r), "basis", axes=True)}

    def choose(self, G: Tensor, P: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """Choose a new orthonormal basis.

        Args:
            G: finite gradient (..., m, n); slices that are zero are ignored afterwards.
            P: the basis so far (..., m, r); the first r axes if `ctx.number == 0`.
            ctx: the step.

        Returns:
            The basis (..., m, r) with any signs, and the largest singular values of G, descending, where known.
        """
        raise NotImplementedError

    def refresh_(self, s: State, G: Tensor, ctx: Context) -> Tensor | None:
        """Replace the basis; return the singular values of G where the rule knows them."""
        P, sigma = self.choose(G, s["basis"], ctx)
        linalg.replace_(s["basis"], P, first=not ctx.number)
        return sigma

    def basis(self, s: State, ctx: Context) -> Basis:
        """Return the basis in use, for all rows."""
        return Dense(s["basis"])

    def evidence(self, s: State, G: Tensor, ctx: Context) -> Tensor:
        """Return what a refresh looks at, in the place of the gradient of this step."""
        return G

    def observe_(self, s: State, G: Tensor) -> None:
        """Take note of a finite gradient that no refresh has looked at."""

    def adopted_(self, s: State, gap: int, overlap: float) -> int:
        """Take note of a new basis; return the number of steps to the next refresh, by default the group's gap.

        Args:
            s: the state.
            gap: the group's update_proj_gap.
            overlap: of the new basis with the one before, in [0, 1]; below 0 for the first.
        """
        return gap


class Moments(Part, ABC):
    """The running statistics, and the direction that they give.

    Dense parameters take the same rule with R = G: a vector as it is, anything else as a matrix whose columns are the
    first axis of the weight.

    Attributes:
        elementwise: whether every element is stepped for itself. Dense tensors then keep their own shape, and pieces
            may be stepped alone.
        transports: what it can do at a refresh.
    """

    elementwise: ClassVar[bool] = False
    transports: ClassVar[tuple[str, ...]] = TRANSPORTS

    @property
    def dense(self) -> Moments:
        """The rule of the parameters that have no subspace; by default the same."""
        return self

    @abstractmethod
    def slots(self, shape: tuple[int, ...], columns: Columns) -> Slots:
        """Declare the state for a gradient (projected or dense) of this shape, the count `moment_step` aside."""

    @abstractmethod
    def update(self, s: State, R: Tensor, ctx: Context) -> Summing[Tensor]:
        """Take R into the moments, in place, and return the direction N before bias correction (a new tensor)."""

    @abstractmethod
    def transport_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        """Carry the moments from the old basis to the new one as `how` says (methods.TRANSPORTS)."""

    def step_scale(self, ctx: Context) -> float:
        """Return c_t, the bias correction of the whole step."""
        return 1.0

    def momentum(self, s: State) -> Tensor:
        """Return the first moment (..., r, n)."""
        return s["exp_avg"]

    def dense_step_(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], contexts: Sequence[Context]
    ) -> None:
        """Step fp32 tensors of one group by an elementwise rule; the default is `update`, one tensor at a time."""
        for W, G, s, ctx in zip(weights, grads, states, contexts, strict=True):
            N = alone(self.update(s, G, ctx))
            W.mul_(1 - ctx.lr * ctx.weight_decay).sub_(N, alpha=ctx.lr * self.step_scale(ctx))


Add = Callable[[Tensor, Tensor, float], None]
"""(X, Z, alpha): X <- X + alpha P Z for this process's piece X of a full-size matrix and Z as R is held."""


class Reconstruction(Part, ABC):
    """From the direction in the subspace to the step of the whole matrix.

    Attributes:
        needs_gradient: whether the step looks at more of G than R, so that G must live until the weight is written.
    """

    needs_gradient: ClassVar[bool] = False

    def slots(self, batch: tuple[int, ...], m: int, n: int, r: int, piece: tuple[int, int]) -> Slots:
        """Declare the state; the default is none. See `Subspace.slots`."""
        return {}

    def absorb(self, s: State, G: Tensor, ctx: Context) -> Summing[tuple[Tensor, dict[str, Tensor]]]:
        """Return what takes the place of this process's piece of the gradient, and new values of slots.

        The values are stored once the step is known to be finite. Sums are over the axis `ctx.split`.
        """
        yield from ()
        return G, {}

    @abstractmethod
    def combine(self, s: State, facts: Facts, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Summing[Update]:
        """Return the step in units of lr c_t.

        Args:
            s: the state.
            facts: of the gradient and the basis.
            R: the projected gradient (..., r, n).
            N: the direction (..., r, n); may be overwritten.
            c_t: the bias correction.
            ctx: the step.
        """

    def moved_(self, s: State, momentum: Callable[[], Tensor], add_: Add, sign: float, ctx: Context) -> None:
        """Take note of a change of basis.

        Called twice: with sign 1 while `momentum` gives the first moment in the old basis, and `add_` goes through
        that; then with sign -1 and the new ones.
        """

    def after_(self, s: State, G: Tensor, R: Tensor, add_: Add) -> None:
        """Take note of a step that was made, G as `absorb` returned it."""


def alone(work: Summing[T]) -> T:
    """Run a computation where this process holds everything: every sum is whole already."""
    try:
        total = next(work)
        while True:
            total = work.send(total)
    except StopIteration as stop:
        result: T = stop.value
        return result
