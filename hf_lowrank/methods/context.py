"""What a part may know of a step, and what it gives back.

Legend: that of methods.parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lowrank.tensors import kernels, random
from hf_lowrank.tensors.bases import Basis
from hf_lowrank.tensors.random import Stream
from hf_lowrank.tensors.rounding import Rounding


@dataclass(frozen=True)
class Columns:
    """What the columns of R (its last axis) are.

    Attributes:
        n: how many there are on all processes.
        block: how many adjacent ones belong together because they are the outputs of one neuron (1) or of one head
            (the head's size); 0 where they are inputs.
        start: the first one that this process holds.
        vector: whether there is no other axis: a dense vector.
        tokens: whether they are the entries of an embedding, whose outputs are the other axis.
    """

    n: int
    block: int = 0
    start: int = 0
    vector: bool = False
    tokens: bool = False


class Context(NamedTuple):
    """What a part may know of the current step of one parameter.

    Attributes:
        step: updates that this parameter has had before this one.
        written: whether the weight has been written in this step: a late refresh looks at the gradient again.
        moment_step: t of the bias correction: updates of the moments, this one included.
        number: which basis is in use or being chosen: 0 is the first.
        earlier, dropped_at: bases that were chosen, and updates, before the state was last dropped.
        lr, beta1, beta2, eps, weight_decay: the group's values at this step.
        peak_lr: the largest learning rate of the schedule, as far as it says; else `lr`.
        scale: the factor alpha on the low-rank update.
        correct_bias: whether Adam's bias correction is applied.
        eps_place: where Adam's eps is added; see `moments.adam.eps_of_root`.
        stochastic_rounding: how weights of low precision are written.
        m, r: rows of the matrix seen wide, and of R; both 0 for a dense parameter.
        rank: the option.
        columns: what the columns of R are.
        key: (seed, index of the parameter in group order).
        place: which piece of the weight this process holds, counted from 0.
        device: where the weight is.
        weight: the parameter, which no rule writes; a DTensor where it is split over processes.
        right: whether it is the basis of the other side that is chosen (`proj_type=full`), m being n then.
    """

    step: int
    written: bool
    moment_step: int
    number: int
    earlier: int
    dropped_at: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    peak_lr: float
    scale: float
    correct_bias: bool
    eps_place: str
    stochastic_rounding: bool
    m: int
    r: int
    rank: float
    columns: Columns
    key: tuple[int, int]
    place: int
    device: torch.device
    weight: torch.Tensor
    right: bool = False

    @property
    def drawn(self) -> int:
        """The number of this basis among all that the parameter has had."""
        return self.earlier + self.number

    @property
    def age(self) -> int:
        """Updates before this one that the state has seen."""
        return self.step - self.dropped_at

    def generator(self, *, paired: bool = True) -> torch.Generator:
        """Return the generator of this basis, keyed by (seed, parameter, `drawn`), on the device.

        Args:
            paired: whether the bases of both sides are drawn alike, as singular vectors are; else each for itself.
        """
        side = (1,) if self.right and not paired else ()
        key = (*self.key, self.drawn, *side)
        return random.generator(Stream.SUBSPACE, *key, device=random.with_float64(self.device))

    def rounding(self, device: torch.device) -> Rounding:
        """Return how this step writes a weight of low precision, keyed by (seed, parameter, step)."""
        key = (Stream.ROUNDING, *self.key, self.step, self.place) if self.stochastic_rounding else None
        return Rounding(key, device)


class ColumnNorms(NamedTuple):
    """Squared norms of columns, computed when they are asked for.

    Attributes:
        G: the gradient, as it lies.
        basis: the basis in use.
        isometric: whether P^T P is the identity.
        of_gradient: ||G_j|| of every column that is held, where they are known already.
    """

    G: Tensor | None
    basis: Basis
    isometric: bool
    of_gradient: Tensor | None = None

    def gradient(self) -> Tensor:
        """Return ||G_j||^2 of every column that R holds, (..., n)."""
        assert self.G is not None, "a part that looks at the gradient says so: needs_gradient"
        known = self.of_gradient
        return self.basis.columns(kernels.column_squared_norms(self.G) if known is None else known.square())

    def projected(self, R: Tensor, r_squared: Tensor) -> Tensor:
        """Return ||P R_j||^2 of every column, (..., n), given ||R_j||^2, which it is for an isometric basis."""
        return r_squared if self.isometric else (R * (self.basis.gram() @ R)).sum(-2)


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


class Carried(NamedTuple):
    """The first moment M (..., r, n) in a basis P: the matrix P M."""

    basis: Basis
    M: Tensor

    def add_to_(self, X: Tensor, alpha: float) -> None:
        """X <- X + alpha P M for a matrix X that lies as the gradient does."""
        self.basis.accumulate_(X, self.M, alpha)
