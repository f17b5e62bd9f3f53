"""MoRA: a square matrix in the place of two factors (arXiv 2405.12130).

Legend: M (k, k), k = floor(sqrt((out + in) r)) · x (..., in) · W = W0 + Delta, Delta x = spread(M gather(x))
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recipes.shared.baselines.adapters import freeze_outside_
from recipes.shared.baselines.factorized import linear_at, plain_linear


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


TYPES = (1, 2, 6)
"""The authors' numbers of those that they use: sharing by strides, by neighbours, and rotation."""


class MoRALinear(nn.Module):
    """y = (W0 + Delta) x + b with as many numbers in M as LoRA has in its two factors (sections 3 and 4).

    Input and output are grouped, by number g:

    - type 1: inputs i = g mod k are summed up, where i goes on from the last input at the first until all groups
      have as many; output o is z[o mod k] of z = M (sums).
    - type 2: neighbouring inputs are summed up, and neighbouring outputs are equal, in k groups whose sizes differ by
      one at most, the large ones first.
    - type 6: the input is cut into pieces of k numbers, the last of which goes on with the first inputs. Piece b is
      turned by the angles b 10000^(-2j/k), as rotary positions are, before M; its output is outputs b k and on, and
      where there are more outputs they repeat. k is even. Delta reaches full rank.

    Differs from the authors' code: k is the paper's, which never has more numbers than LoRA; the code rounds to the
    nearest.

    Args:
        linear: the layer to adapt, which stays as `base_layer`.
        rank: r.
        sharing: 1, 2 or 6.
        dropout: probability, before the input is grouped.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, sharing: int, dropout: float) -> None:
        super().__init__()
        size = isqrt((linear.in_features + linear.out_features) * rank)
        size -= size % 2 if sharing == 6 else 0
        self.base_layer = linear
        self.dropout = nn.Dropout(dropout)
        self.square_factor = nn.Parameter(linear.weight.new_zeros(size, size))
        self.sharing = sharing

    def get_extra_state(self) -> Tensor:
        """Return the type, which ReMoRA changes: checkpoints hold it."""
        return torch.tensor(self.sharing)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the type of a checkpoint."""
        self.sharing = int(state)

    def forward(self, x: Tensor) -> Tensor:
        """Return (W0 + Delta) x + b. Shapes: (..., in) -> (..., out)."""
        y: Tensor = self.base_layer(x)
        return y + self._adapter(self.dropout(x), self.square_factor).to(y.dtype)

    def delta(self) -> Tensor:
        """Return Delta (out, in) in fp32: what the adapter makes of every unit vector."""
        unit = torch.eye(self.base_layer.in_features, device=self.square_factor.device)
        return self._adapter(unit, self.square_factor.float()).T

    def product(self) -> nn.Linear:
        """Return the ordinary layer with the weight W0 + Delta."""
        weight = self.base_layer.weight
        merged = weight.detach().float() + self.delta().detach()
        return plain_linear(merged, self.base_layer.bias, weight.dtype)

    @torch.no_grad()
    def restart_(self) -> nn.Parameter:
        """Add Delta to W0 and start with M = 0; type 1 becomes 2, and 2 becomes 1. Return M."""
        weight = self.base_layer.weight
        weight.copy_(weight.float() + self.delta())
        self.square_factor.zero_()
        self.sharing = {1: 2, 2: 1}.get(self.sharing, self.sharing)
        return self.square_factor

    def _adapter(self, x: Tensor, M: Tensor) -> Tensor:
        inputs, outputs, k = x.shape[-1], self.base_layer.out_features, len(M)
        if self.sharing == 2:
            sizes = torch.full((k,), outputs // k, device=x.device)
            sizes[: outputs % k] += 1
            return nn.functional.linear(_sums(x, k), M).repeat_interleave(sizes, -1, output_size=outputs)
        pieces = -(-inputs // k)
        x = x[..., torch.arange(pieces * k, device=x.device) % inputs].unflatten(-1, (pieces, k))
        if self.sharing == 1:
            z = nn.functional.linear(x.sum(-2), M)
        else:
            z = nn.functional.linear(_turned(x), M).flatten(-2)
        return z[..., torch.arange(outputs, device=x.device) % z.shape[-1]]


def _sums(x: Tensor, groups: int) -> Tensor:
    """Sum neighbours up, in groups whose sizes differ by one at most, the large first: (..., n) -> (..., groups)."""
    small, large = divmod(x.shape[-1], groups)
    cut = large * (small + 1)
    first, rest = x[..., :cut], x[..., cut:]
    first = first.reshape(*x.shape[:-1], large, small + 1).sum(-1)
    return torch.cat([first, rest.reshape(*x.shape[:-1], groups - large, small).sum(-1)], -1)


def _turned(x: Tensor) -> Tensor:
    """Turn piece b of (..., pieces, k) by b 10000^(-2j/k) in the plane of the numbers j and j + k / 2."""
    pieces, k = x.shape[-2:]
    rates = 10000.0 ** (-torch.arange(0, k, 2, device=x.device) / k)
    angles = torch.arange(pieces, device=x.device)[:, None] * rates  # (pieces, k / 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def mora_(model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str, seed: int) -> None:
    """Put MoRA into a model; base weights are frozen, and what `also_train` does not find. ReMoRA starts with type 1.

    Raises:
        ValueError: if there is no such type.
    """
    if args.mora_type not in TYPES:
        raise ValueError(f"--mora_type must be one of {', '.join(map(str, TYPES))}, not {args.mora_type}")
    sharing = 1 if args.baseline == "remora" else args.mora_type
    for name in targets:
        linear = linear_at(model, name, str(args.baseline))
        layer = MoRALinear(linear, rank=args.adapter_rank, sharing=sharing, dropout=args.adapter_dropout)
        model.set_submodule(name, layer)
    freeze_outside_(model, also_train)
