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
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor

from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.registry import TRANSPORTS, Part
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors import kernels
from hf_lowrank.tensors.bases import Basis, Dense
from hf_lowrank.tensors.layout import clamp_rank
from hf_lowrank.tensors.sums import Summing, alone


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
        kernels.replace_(s["basis"], P, first=not ctx.number)
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
