"""Singular vectors sampled by importance: I3S, and the uniform and hybrid rules of its analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import choice, integer
from hf_lowrank.methods.subspaces.decomposed import EXACT, Decomposed, spectrum
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import kernels, random


def _spectrum_option() -> Any:
    return choice(
        *EXACT,
        help="gram: eigenvectors of G G^T in float64; svd: full SVD in float64. Both give the whole "
        "spectrum, which sampling needs; 'randomized' and 'power' do not",
    )


@dataclass(frozen=True)
class I3S(Decomposed, key="i3s"):
    """P = U[:, I], I = r indices drawn without replacement with weight sigma_i, sorted ascending.

    References:
        I3S, arXiv 2502.05790 (later titled SARA), Algorithm 2.

    Differs from the authors' code: none was released. The sequential draw is done as Gumbel top-r, which has the same
    law, from a generator keyed by (seed, parameter, refresh number).
    """

    refresh: str = _spectrum_option()

    @override
    def choose(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        U, sigma = spectrum(G, self.refresh)
        return kernels.take_columns(U, random.gumbel_top_r(sigma, s["basis"].shape[-1], ctx.generator())), sigma


@dataclass(frozen=True)
class Hybrid(Decomposed, key="hybrid"):
    """P = [U[:, :r0], U[:, J]], J = r - r0 indices drawn uniformly without replacement from the others, sorted.

    r0 = 0 is the uniform rule, r0 = r the dominant one.

    References:
        I3S, arXiv 2502.05790, Algorithm 3.

    Differs from the authors' code: none was released. The paper analyses it with momentum SGD (Algorithm 4) and says
    nothing of a second moment: with Adam's, `on_refresh=rotate` projects M as printed and keeps V.
    """

    on_refresh: ClassVar[str] = "rotate"

    refresh: str = _spectrum_option()
    r0: int | None = integer(None, minimum=0, help="leading vectors that are always taken; default rank/2")

    @override
    def choose(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        U, sigma = spectrum(G, self.refresh)
        r = s["basis"].shape[-1]
        r0 = r // 2 if self.r0 is None else min(self.r0, r)
        drawn = _uniform_indices(sigma[..., r0:], r - r0, ctx) + r0
        first = torch.arange(r0, device=drawn.device).expand(*drawn.shape[:-1], r0)
        return kernels.take_columns(U, torch.cat([first, drawn], -1)), sigma


@dataclass(frozen=True)
class Uniform(Decomposed, key="uniform"):
    """P = U[:, J], J = r indices drawn uniformly without replacement, sorted.

    References:
        I3S, arXiv 2502.05790, sections 3.3 (r0 = 0) and 4.5.

    Differs from the authors' code: none was released. The draw is Gumbel top-r with equal weights, keyed as in I3S.
    """

    refresh: str = _spectrum_option()

    @override
    def choose(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        U, sigma = spectrum(G, self.refresh)
        return kernels.take_columns(U, _uniform_indices(sigma, s["basis"].shape[-1], ctx)), sigma


def _uniform_indices(sigma: Tensor, r: int, ctx: Context) -> Tensor:
    return random.gumbel_top_r(torch.ones_like(sigma), r, ctx.generator())
