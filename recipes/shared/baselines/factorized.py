"""Low-rank factorisation: a matrix that is never anything but a product."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


class FactorizedLinear(nn.Module):
    """y = B A x + b: a linear layer whose weight has rank r because it is never anything but a product.

    The factors start as the best approximation of the layer's weight, B = U sqrt(S) and A = sqrt(S) V^T with its r
    leading singular triples ("spectral initialisation", arXiv 2209.13569).

    Args:
        linear: the layer to replace.
        rank: r, at most the short side.
    """

    def __init__(self, linear: nn.Linear, *, rank: int) -> None:
        super().__init__()
        weight = linear.weight.detach()
        rank = min(rank, *weight.shape)
        options = {"device": weight.device, "dtype": weight.dtype}
        self.down_factor = nn.Linear(linear.in_features, rank, bias=False, **options)
        self.up_factor = nn.Linear(rank, linear.out_features, bias=linear.bias is not None, **options)
        U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        root = S[:rank].sqrt()
        with torch.no_grad():
            self.down_factor.weight.copy_(root[:, None] * Vh[:rank])  # (r, in)
            self.up_factor.weight.copy_(U[:, :rank] * root)  # (out, r)
            if linear.bias is not None:
                self.up_factor.bias.copy_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return B A x + b. Shapes: (..., in) -> (..., out)."""
        return self.up_factor(self.down_factor(x))

    def product(self) -> nn.Linear:
        """Return the ordinary layer with the weight B A."""
        B, A = self.up_factor.weight.detach(), self.down_factor.weight.detach()
        return plain_linear(B.float() @ A.float(), self.up_factor.bias, A.dtype)


def plain_linear(weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype) -> nn.Linear:
    """Return a linear layer of a weight (out, in), which is rounded to `dtype`, and a bias (out,)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype))
    linear.bias = bias
    return linear


def linear_at(model: nn.Module, name: str, baseline: str) -> nn.Linear:
    """Return the linear layer of a name, for a baseline that replaces those alone."""
    if not isinstance(module := model.get_submodule(name), nn.Linear):
        raise ValueError(f"--baseline {baseline} replaces nn.Linear alone; {name} is a {type(module).__name__}")
    return module


def low_rank_(model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str, seed: int) -> None:
    """Replace linear layers by products of two factors, all of them trainable, beside all that trains already."""
    for name in targets:
        layer = FactorizedLinear(linear_at(model, name, "low_rank"), rank=args.adapter_rank)
        model.set_submodule(name, layer)
