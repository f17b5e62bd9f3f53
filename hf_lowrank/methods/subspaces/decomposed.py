"""What subspaces have in common whose bases are singular vectors of the gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_lowrank.methods import options as opt
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.tensors import kernels


EXACT = ("gram", "svd")
"""Ways to all singular vectors, in float64: a refresh takes long, and whatever torch's flags say of the precision of
fp32 products it has the same result."""


@dataclass(frozen=True)
class Decomposed(Subspace):
    """A refresh looks at the gradient alone, so it may go on beside the steps that follow."""

    refresh: str = opt.choice(*EXACT, help="how singular vectors are found")
    async_refresh: int = opt.integer(
        0,
        minimum=0,
        help="on an accelerator, find new bases beside the steps and adopt them this many steps later; 0: wait for "
        "them. Keeps room for one more basis",
    )

    def __post_init__(self) -> None:
        if self.async_refresh and self.refresh not in EXACT:
            raise ValueError(
                f"refresh={self.refresh} takes too little time to go on beside the steps: async_refresh is for "
                f"refresh={' and '.join(EXACT)}"
            )


def spectrum(G: Tensor, refresh: str) -> tuple[Tensor, Tensor]:
    """Return all left singular vectors and values of G, by the way `refresh` says: one of EXACT."""
    return kernels.svd_basis(G) if refresh == "svd" else kernels.gram_basis(G)
