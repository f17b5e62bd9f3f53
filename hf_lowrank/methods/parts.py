"""The three kinds of parts a method is made of.

A part is a frozen dataclass: its fields are its hyper-parameters and its options; its methods are the mathematics. It
holds no state: it declares the tensors it owns (`slots`), the engine allocates and saves them and hands them back as
`s`. A method that needs a sum over processes is a generator that yields it (tensors.sums); any other is a function.

Legend: W weight, G gradient, both seen wide (..., m, n), short side first · P basis (..., m, r) · R = P^T G (..., r,
n) · M, V moments · N direction before bias correction (..., r, n) · C = P_new^T P_old change of basis (..., r, r).
Functions that end in an underscore write in place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from hf_lowrank.methods.context import Carried, ColumnNorms, Columns, Context, Update
from hf_lowrank.methods.registry import TRANSPORTS, Part
from hf_lowrank.state.slots import Slot, Slots, State
from hf_lowrank.tensors import kernels
from hf_lowrank.tensors.bases import Basis, Dense
from hf_lowrank.tensors.layout import clamp_rank
from hf_lowrank.tensors.sums import Rule, alone


class Subspace(Part, ABC):
    """Where the moments live: how a basis is chosen and kept.

    Attributes:
        on_refresh: what the paper does with the moments at a refresh (registry.TRANSPORTS).
        orthonormal: whether the columns of a new basis are orthonormal.
        late: whether bases after the first are chosen when the weight has been written, for the next step.
        needs_momentum: whether a refresh looks at the first moment, which it finds as s["momentum"] (..., r, n).
        whole: whether R is the gradient itself.
        projected: axes of R, for one matrix.
        splits_rows: whether the rows of a matrix, seen wide, may lie on several processes.
    """

    on_refresh: ClassVar[str] = "keep"
    orthonormal: ClassVar[bool] = True
    late: ClassVar[bool] = False
    needs_momentum: ClassVar[bool] = False
    whole: ClassVar[bool] = False
    projected: ClassVar[str] = "r n"
    splits_rows: ClassVar[bool] = True

    @property
    def needs_gradient(self) -> bool:
        """Whether every step looks at the gradient itself, so that it must live until the weight is written."""
        return self.late

    @property
    def replaces_gradient(self) -> bool:
        """Whether `refresh_gradient` returns a new matrix."""
        return False

    def check_rank(self, rank: float) -> None:
        """Refuse a value of the option `rank` that the rule cannot take; the default takes all.

        Raises:
            ValueError: saying what it takes.
        """

    def rank(self, m: int, n: int, rank: float) -> int:
        """Return r for the option `rank`."""
        return clamp_rank(rank, m, n)

    def slots(self) -> Slots:
        """Declare the state; the default is one stored basis that starts as the first r axes."""
        return {"basis": Slot("m r", "basis", axes_first=True)}

    def choose(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """Choose a new orthonormal basis.

        Args:
            s: the state; s["basis"] is the basis so far (..., m, r), the first r axes if `ctx.number == 0`.
            G: finite gradient (..., m, n); slices that are zero are ignored afterwards.
            ctx: the step.

        Returns:
            The basis (..., m, r) with any signs, and the largest singular values of G, descending, where known.
        """
        raise NotImplementedError

    def first(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """Choose the first basis; the default is as any other. See `choose`."""
        return self.choose(s, G, ctx)

    @property
    def begins_apart(self) -> bool:
        """Whether the first basis is chosen in another way than those after it."""
        return type(self).first is not Subspace.first

    def refresh_(self, s: State, G: Tensor, ctx: Context) -> Tensor | None:
        """Replace the basis; return the singular values of G where the rule knows them."""
        P, sigma = (self.choose if ctx.number else self.first)(s, G, ctx)
        kernels.replace_(s["basis"], P, first=not ctx.number)
        return sigma

    def basis(self, s: State, ctx: Context) -> Basis:
        """Return the basis in use, for all rows."""
        return Dense(s["basis"])

    def refresh_gradient(self, s: State, G: Tensor, ctx: Context) -> Tensor:
        """Return what a refresh looks at, in the place of the gradient of this step."""
        return G

    def observe(self, s: State, R: Tensor, ctx: Context) -> Rule[None]:
        """Take note of the projected gradient of a step, in place. Sums may be asked for over the columns of R."""

    def accumulate_(self, s: State, G: Tensor) -> None:
        """Take note of a finite gradient that no refresh has looked at."""

    def interval_(self, s: State, gap: int, overlap: float) -> int:
        """Take note of a new basis; return the number of steps to the next refresh, by default the group's gap.

        Args:
            s: the state.
            gap: the group's update_proj_gap.
            overlap: of the new basis with the one before, in [0, 1]; below 0 for the first.
        """
        return gap


class Moments(Part, ABC):
    """The running statistics, and the direction that they give.

    Dense parameters take the same rule, or one that the option `dense` names, with R = G: a vector as it is, anything
    else as a matrix whose columns are the first axis of the weight.

    Attributes:
        elementwise: whether every element is stepped for itself. Dense tensors then keep their own shape, and pieces
            may be stepped alone.
        keeps_momentum: whether there is a first moment, at which other parts may look.
        of_gradients: whether that is a running mean of R itself, which may be weighed against gradients.
        needs_weight: whether it looks at the weight itself (`ctx.weight`).
        images: how many fp32 tensors of a dense parameter's size its step makes, at most, beside weight and gradient.
        transports: what it can do at a refresh.
    """

    elementwise: ClassVar[bool] = False
    keeps_momentum: ClassVar[bool] = True
    of_gradients: ClassVar[bool] = True
    needs_weight: ClassVar[bool] = False
    images: ClassVar[int] = 4
    transports: ClassVar[tuple[str, ...]] = TRANSPORTS

    @property
    def dense(self) -> Moments:
        """The rule of the parameters that have no subspace and are given no other; by default the same."""
        return self

    @abstractmethod
    def slots(self, columns: Columns) -> Slots:
        """Declare the state of a gradient (projected or dense) with axes r and n; the count `moment_step` is there."""

    @abstractmethod
    def update(self, s: State, R: Tensor, ctx: Context) -> Rule[Tensor]:
        """Take R into the moments, in place, and return the direction N before bias correction.

        N may be a moment or R itself, and R the gradient: nobody writes in them. Sums may be asked for over the
        columns of R.
        """

    def transport_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        """Carry the moments from the old basis to the new one as `how` says (registry.TRANSPORTS)."""
        if how == "reset":
            for name in (*self.slots(ctx.columns), "moment_step"):
                s[name].zero_()
        elif how != "keep":
            self.rotate_(s, C, how, ctx)

    def rotate_(self, s: State, C: Tensor, how: str, ctx: Context) -> None:
        """Carry the moments into the new basis by C, in place: M <- C M, and the others as far as `how` asks."""
        raise NotImplementedError

    def step_scale(self, ctx: Context) -> float:
        """Return c_t, the bias correction of the whole step."""
        return 1.0

    def beta1(self, usual: float) -> float:
        """Return b1 of matrices, from the first of betas."""
        return usual

    def first_moment(self, s: State, ctx: Context) -> Tensor:
        """Return the first moment (..., r, n) as a running mean: other parts weigh it against gradients."""
        return s["exp_avg"]

    def mean_gradient(self, s: State, ctx: Context) -> Tensor:
        """Return the first moment before this step as a mean whose weights sum to one, as a subspace looks at it."""
        M, taken = self.first_moment(s, ctx), ctx.moment_step - 1
        return M / (1 - ctx.beta1**taken) if taken else M

    def dense_step_(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[State], contexts: Sequence[Context]
    ) -> None:
        """Step fp32 tensors of one group by an elementwise rule; the default is `update`, one tensor at a time."""
        for W, G, s, ctx in zip(weights, grads, states, contexts, strict=True):
            N = alone(self.update(s, G, ctx))
            if (beta := 1 - ctx.lr * ctx.weight_decay) != 1.0:
                W.mul_(beta)
            W.sub_(N, alpha=ctx.lr * self.step_scale(ctx))


class Reconstruction(Part, ABC):
    """From the direction in the subspace to the step of the whole matrix.

    Attributes:
        needs_gradient: whether the step looks at more of G than R, so that G must live until the weight is written.
        needs_momentum: whether it is told of a change of basis (`change_basis_`).
        needs_orthonormal: whether G - P R must be what P leaves out, which it is of an orthonormal basis alone.
        scales_residual: whether G - P R is brought to a size of its own however small it is, which would blow rounding
            errors up: the factors of R, and of P Z for fp32 weights, are not rounded to bf16 or TF32 then, whatever
            the option `products` says.
        replaces_gradient: whether `absorb` returns a new matrix.
        plain: whether the step is alpha P N and nothing else.
        by_columns: whether all that it looks at of G, beside R, are the norms of columns, and all that it does is P Z
            + G diag(d): then many matrices of one shape may step at once on an accelerator.
    """

    needs_gradient: ClassVar[bool] = False
    by_columns: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    needs_momentum: ClassVar[bool] = False
    needs_orthonormal: ClassVar[bool] = False
    scales_residual: ClassVar[bool] = False
    replaces_gradient: ClassVar[bool] = False

    def slots(self) -> Slots:
        """Declare the state; the default is none."""
        return {}

    def rate(self, scale: float) -> float:
        """Return what the learning rate is multiplied by for the option `scale`."""
        return scale

    def absorb(self, s: State, G: Tensor, ctx: Context) -> Rule[tuple[Tensor, dict[str, Tensor]]]:
        """Return what takes the place of this process's piece of the gradient, and new values of slots.

        The values are stored once the step is known to be finite. Sums may be asked for over the columns and the rows
        of the gradient.
        """
        return G, {}

    @abstractmethod
    def combine(self, s: State, norms: ColumnNorms, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Rule[Update]:
        """Return the step in units of lr c_t. Sums may be asked for over the columns of R.

        Args:
            s: the state.
            norms: of the columns of the gradient and of P R.
            R: the projected gradient (..., r, n).
            N: the direction (..., r, n), which may be a moment or R itself: not to be overwritten.
            c_t: the bias correction.
            ctx: the step.
        """

    def change_basis_(self, s: State, G: Tensor, old: Carried, new: Carried, ctx: Context) -> None:
        """Take note of a change of basis.

        Args:
            s: the state.
            G: the gradient that the refresh looked at, as `absorb` returned it.
            old: what the first moment was.
            new: what has become of it.
            ctx: the step.
        """

    def after_step_(self, s: State, G: Tensor, R: Tensor, basis: Basis) -> None:
        """Take note of a step that was made, G as `absorb` returned it."""
