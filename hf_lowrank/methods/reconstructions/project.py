"""The plain way back: GaLore."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.parts import Facts, Reconstruction, Update
from hf_lowrank.state.slots import State
from hf_lowrank.tensors.sums import Summing


@dataclass(frozen=True)
class Project(Reconstruction, key="project"):
    """U = alpha P N.

    References:
        GaLore, arXiv 2403.03507, Algorithm 2; I3S, arXiv 2502.05790, eq. 1.

    Differs from the authors' code: the product is added to the weight as it is computed, without a matrix of the
    weight's size; weights decay before the step instead of after it.
    """

    def combine(self, s: State, facts: Facts, R: Tensor, N: Tensor, c_t: float, ctx: Context) -> Summing[Update]:
        """See `Reconstruction.combine`."""
        yield from ()
        return Update(N, ctx.scale)
