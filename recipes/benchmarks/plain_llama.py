"""A LLaMA in torch alone, for where transformers is not: the same shapes, names and arithmetic, random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


SIZES = {
    "tiny": (32, 48, 2, 2),
    "60m": (512, 1376, 8, 8),
    "350m": (1024, 2736, 16, 24),
    "1b": (2048, 5461, 32, 24),
    "7b": (4096, 11008, 32, 32),
}
"""Width, inner width, heads and layers."""


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., width)."""
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class Layer(nn.Module):
    """Attention with rotary positions and a gated feed-forward network."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.norm_1, self.norm_2 = Norm(width), Norm(width)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        """Map (batch, tokens, width), with the rotary angles (tokens, head / 2) as (cos, sin)."""
        y = self.norm_1(x)
        q, k, v = (
            f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(_turned(q, turn), _turned(k, turn), v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(-2))
        y = self.norm_2(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    cos, sin = turn
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class PlainLlama(nn.Module):
    """A causal language model whose output is its loss.

    Args:
        size: of SIZES.
    """

    def __init__(self, size: str) -> None:
        super().__init__()
        width, inner, heads, layers = SIZES[size]
        self.vocabulary, self.head_dim = (64 if size == "tiny" else 32000), width // heads
        self.embed_tokens = nn.Embedding(self.vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, inner, heads) for _ in range(layers))
        self.norm = Norm(width)
        self.lm_head = nn.Linear(width, self.vocabulary, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the mean loss of the next token of ids (batch, tokens)."""
        x = self.embed_tokens(ids)
        half = torch.arange(0, self.head_dim, 2, device=ids.device, dtype=torch.float32) / self.head_dim
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * 10000.0**-half
        turn = torch.stack([angles.cos(), angles.sin()]).to(x.dtype)
        for layer in self.layers:
            x = layer(x, turn)
        logits = self.lm_head(self.norm(x))[:, :-1].flatten(0, 1).float()
        return F.cross_entropy(logits, ids[:, 1:].flatten())
