"""A subspace that follows the gradient at every step by one block power iteration: LDAdam.

Legend: P basis before (..., m, r) · M^ corrected first moment (..., r, n) · B = b^T P (..., n, r).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import number
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import kernels


@dataclass(frozen=True)
class BlockPower(Subspace, key="block_power"):
    """P' = QR(b b^T P) for b = rho P M^ + (1 - rho) G; the first basis is the dominant one.

    b is never formed: with B^T = P^T b = rho P^T P M^ + (1 - rho) P^T G, b B = rho P (M^ B) + (1 - rho) G B.

    References:
        LDAdam, arXiv 2410.16103, Algorithm 1 and its section on block power iteration.

    Differs from the authors' code: b is never formed; the first basis comes from the Gram matrix instead of an SVD, of
    which there is no option; signs are aligned with the basis before. Basis and moments are fp32 by default, whatever
    the weights are.
    """

    on_refresh: ClassVar[str] = "rotate_variance"
    wants: ClassVar[tuple[str, ...]] = ("exp_avg",)

    rho: float = number(0.908, below=1.0, help="LDAdam: weight of the momentum in what the subspace follows")

    @property
    def needs_gradient(self) -> bool:
        """See `Subspace.needs_gradient`."""
        return True

    def refresh_(self, s: State, G: Tensor, ctx: Context) -> Tensor | None:
        """See `Subspace.refresh_`."""
        G, P = G.float(), s["basis"]
        if ctx.number == 0:
            U, sigma = kernels.gram_basis(G)
            kernels.replace_(P, U[..., : P.shape[-1]], first=True)
            return sigma
        M = s["exp_avg"] / (1 - ctx.beta1 ** (ctx.moment_step - 1)) if ctx.moment_step > 1 else s["exp_avg"]
        B = (self.rho * (P.mT @ P) @ M + (1 - self.rho) * (P.mT @ G)).mT  # (..., n, r)
        new = kernels.orthonormalize(self.rho * P @ (M @ B) + (1 - self.rho) * (G @ B))
        kernels.replace_(P, new, first=False)
        return None
