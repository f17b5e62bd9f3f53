"""A subspace that follows the gradient at every step by one block power iteration: LDAdam.

Legend: P basis before (..., m, r) · M^ corrected first moment (..., r, n) · B = b^T P (..., n, r).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import number
from hf_lowrank.methods.parts import Subspace
from hf_lowrank.methods.subspaces.dominant import dominant
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import kernels


@dataclass(frozen=True)
class BlockPower(Subspace, key="block_power"):
    """P' = QR(b b^T P) for b = rho P M^ + (1 - rho) G; the first basis is the dominant one.

    b is never formed: with B^T = P^T b = rho P^T P M^ + (1 - rho) P^T G, b B = rho P (M^ B) + (1 - rho) G B.

    The authors' settings are betas (0.908, 0.99), the first of them rho, and rank 16; betas are Trainer's (0.9, 0.999)
    and the rank is 128 where nothing is said. The row `ldadam` has `proj_type=paper`, since they project square
    matrices from the left.

    References:
        LDAdam, arXiv 2410.16103, Algorithm 1 and its section on block power iteration.

    Differs from the authors' code: b is never formed; the first basis comes from the Gram matrix instead of an SVD, of
    which there is no option; signs are aligned with the basis before. Basis and moments are fp32 by default, whatever
    the weights are.
    """

    on_refresh: ClassVar[str] = "rotate_variance"
    needs_momentum: ClassVar[bool] = True

    rho: float = number(0.908, below=1.0, help="LDAdam: weight of the momentum in what the subspace follows")

    @property
    @override
    def needs_gradient(self) -> bool:
        return True

    @override
    def first(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """The leading vectors."""
        return dominant(G, s["basis"], "gram", ctx)

    @override
    def choose(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        G, P, M = G.float(), s["basis"], s["momentum"]
        B = (self.rho * (P.mT @ P) @ M + (1 - self.rho) * (P.mT @ G)).mT  # (..., n, r)
        return kernels.orthonormalize(self.rho * P @ (M @ B) + (1 - self.rho) * (G @ B)), None
