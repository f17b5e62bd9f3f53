"""SLTrain: a matrix that is a low-rank product and a sparse one (arXiv 2406.02214).

Legend: B (out, r) · A (r, in) · v (k,) the values of the sparse part · s = alpha / r · W = s B A + S (out, in)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hf_lowrank.tensors.random import generator
from recipes.shared.baselines.factorized import linear_at, plain_linear


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


class SparseLowRankLinear(nn.Module):
    """y = (s B A + S) x + b: a linear layer in which S has values at places that are drawn once and stay.

    The weight of the layer that it replaces is thrown away, and at the start W = S: this trains from scratch. W is
    never kept: it is built for the product and built again in the backward pass.

    Args:
        linear: the layer to replace; its bias stays.
        rank: r.
        alpha: s = alpha / r.
        density: share of the places in S, above 0 and below 1: k = floor(density out in).
        gen: what places and first values are drawn from, on the CPU: A and v uniform within 1 / sqrt(in); B is zero.
    """

    support: Tensor

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, density: float, gen: torch.Generator) -> None:
        super().__init__()
        (m, n), weight = linear.weight.shape, linear.weight
        places = torch.randperm(m * n, generator=gen)[: int(density * m * n)].sort().values
        # in int32 where it fits: the places then take as much memory as values in fp32
        self.register_buffer("support", places.to(weight.device, torch.int32 if m * n < 2**31 else torch.int64))

        def uniform(*shape: int) -> nn.Parameter:
            drawn = torch.empty(shape).uniform_(-(n**-0.5), n**-0.5, generator=gen)
            return nn.Parameter(drawn.to(weight))

        self.down_factor = uniform(rank, n)
        self.up_factor = nn.Parameter(weight.new_zeros(m, rank))
        self.sparse_values = uniform(len(places))
        self.bias = linear.bias
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b. Shapes: (..., in) -> (..., out)."""
        y: Tensor = _Product.apply(x, self.up_factor, self.down_factor, self.sparse_values, self.support, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self) -> nn.Linear:
        """Return the ordinary layer with the weight s B A + S."""
        B, A, v = (p.detach().float() for p in (self.up_factor, self.down_factor, self.sparse_values))
        return plain_linear(_weight(B, A, v, self.support, self.scale), self.bias, self.up_factor.dtype)


def _weight(B: Tensor, A: Tensor, v: Tensor, support: Tensor, s: float) -> Tensor:
    W = s * (B @ A)
    W.view(-1).index_add_(0, support, v.to(W.dtype))  # under autocast the product has another dtype than v
    return W


class _Product(torch.autograd.Function):
    """x Wᵀ, of which autograd keeps x and what W is made of; with G = (dL/dy)ᵀ x:

    dB = s G Aᵀ,  dA = s Bᵀ G,  dv = G at the places of S.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, B: Tensor, A: Tensor, v: Tensor, support: Tensor, s: float) -> Tensor:
        ctx.save_for_backward(x, B, A, v, support)
        ctx.s = s
        return nn.functional.linear(x, _weight(B, A, v, support, s))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, B, A, v, support = ctx.saved_tensors
        b, a = B.to(dy.dtype), A.to(dy.dtype)
        dx = (dy @ _weight(b, a, v, support, ctx.s)).to(x.dtype) if ctx.needs_input_grad[0] else None
        G = dy.flatten(0, -2).T @ x.flatten(0, -2).to(dy.dtype)
        dv = G.view(-1).index_select(0, support)
        return dx, (ctx.s * G @ a.T).to(B.dtype), (ctx.s * b.T @ G).to(A.dtype), dv.to(v.dtype), None, None


def sltrain_(model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str, seed: int) -> None:
    """Replace linear layers by low-rank and sparse ones; all else trains as before.

    Raises:
        ValueError: if the density is not between 0 and 1.
    """
    if not 0 < args.sltrain_density < 1:
        raise ValueError(f"--sltrain_density must be above 0 and below 1, not {args.sltrain_density:g}")
    for number, name in enumerate(targets):
        layer = SparseLowRankLinear(
            linear_at(model, name, "sltrain"),
            rank=args.adapter_rank,
            alpha=args.adapter_alpha,
            density=args.sltrain_density,
            gen=generator(seed, number),
        )
        model.set_submodule(name, layer)
