"""Private generators, keyed and never stored, and what is drawn from them.

Legend: U left singular vectors (..., m, k) · sigma singular values (..., k), descending.
"""

from __future__ import annotations

import hashlib
import struct
from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """The first number of every key: what draws from one stream draws from no other."""

    SUBSPACE = 0
    ROUNDING = 1
    OBSERVER = 2
    SKETCH = 3


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a private generator whose stream is a function of `key` alone (never the global generator)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def uniform_stiefel(shape: torch.Size, gen: torch.Generator) -> Tensor:
    """Draw an orthonormal (..., m, r) matrix uniformly (Haar): QR of a Gaussian with the signs of diag(R) fixed."""
    Q, R = torch.linalg.qr(torch.randn(shape, generator=gen, dtype=torch.float32))
    uniform: Tensor = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return uniform


def gumbel_top_r(weights: Tensor, r: int, gen: torch.Generator) -> Tensor:
    """Draw r of k indices without replacement with probability proportional to `weights`, sorted ascending.

    Sequential draws without replacement follow the Plackett-Luce law, which is that of the r largest values of
    log(weight) + Gumbel noise. Where fewer than r weights are positive, all of those are taken and the rest is filled
    with the first of the others.

    Args:
        weights: (..., k), non-negative.
        r: number of draws, at most k.
        gen: CPU generator; the draw is the same on every device and rank.

    Returns:
        Indices (..., r), int64.
    """
    uniform = torch.rand(weights.shape, generator=gen, dtype=torch.float64).clamp_min_(torch.finfo(torch.float64).tiny)
    noise = -torch.log(-torch.log(uniform))
    filler = -1e30 - torch.arange(weights.shape[-1], dtype=torch.float64) * 1e25
    logs = weights.cpu().double().log()
    keys = torch.where(logs.isneginf(), filler, logs + noise)
    return keys.topk(r, dim=-1).indices.sort(-1).values.to(weights.device)


def draw(weights: Tensor, r: int, gen: torch.Generator) -> Tensor:
    """Draw r of k indices with replacement, with probability proportional to `weights` (..., k); int64 (..., r).

    By inversion of the cumulative sums in float64, so that the draw is the same on every device.
    """
    sums = weights.cpu().double().cumsum(-1)
    uniform = torch.rand(*weights.shape[:-1], r, generator=gen, dtype=torch.float64) * sums[..., -1:]
    found = torch.searchsorted(sums, uniform, right=True)
    return found.clamp_max_(weights.shape[-1] - 1).to(weights.device)
