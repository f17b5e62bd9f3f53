"""The leading singular vectors of the gradient: GaLore."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import choice
from hf_lowrank.methods.subspaces.decomposed import Decomposed, spectrum
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import kernels


@dataclass(frozen=True)
class Dominant(Decomposed, key="dominant"):
    """P = U[:, :r], the r leading left singular vectors of the gradient at the refresh.

    References:
        GaLore, arXiv 2403.03507, Algorithm 2.

    Differs from the authors' code: the vectors come from the Gram matrix G G^T in float64 instead of a full SVD
    (in a fraction of the time; the same vectors, as far as the squares of neighbouring singular values differ by more
    than some 1e-12 of the largest square), and their signs are aligned with the basis before.
    """

    refresh: str = choice(
        "gram",
        "svd",
        "randomized",
        "power",
        help="gram: eigenvectors of G G^T in float64; svd: full SVD in float64, right below 1e-6 of the largest value "
        "too; randomized: range finder with two power iterations; power: one step warm-started at the old basis (the "
        "first is gram's)",
    )

    @override
    def choose(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        return dominant(G, s["basis"], self.refresh, ctx)


def dominant(G: Tensor, P: Tensor, refresh: str, ctx: Context) -> tuple[Tensor, Tensor]:
    """Return the r leading left singular vectors of G (..., m, n) and singular values, by the way `refresh` says.

    Args:
        G: gradient.
        P: the basis so far (..., m, r).
        refresh: gram, svd, randomized or power.
        ctx: the step.
    """
    r = P.shape[-1]
    if refresh == "randomized":
        return kernels.range_finder(G, r, ctx.generator())
    if refresh == "power" and ctx.number:
        return kernels.power_step(G, P)
    U, sigma = spectrum(G, refresh)
    return U[..., :r], sigma
