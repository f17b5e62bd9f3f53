"""Private generators, keyed and never stored, and what is drawn from them.

Legend: U left singular vectors (..., m, k) · sigma singular values (..., k), descending.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """The first number of every key: what draws from one stream draws from no other."""

    SUBSPACE = 0
    ROUNDING = 1
    OBSERVER = 2
    SKETCH = 3
    LAYERS = 4


def seed(*key: int) -> int:
    """Return a number of 63 bits that is a function of `key` alone."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a private generator whose stream is a function of `key` alone (never the global generator)."""
    return torch.Generator(device=device).manual_seed(seed(*key))


PATTERN = 1021
"""Words that one piece of a tensor differs from the last in; a prime, so that it keeps step with no row."""


class Bits:
    """Random integers for one piece of a tensor after another.

    The words of the first piece, and of any that is larger than all before it, are drawn. Those of any other piece are
    the last one's, to which `PATTERN` words that are drawn anew are added (exclusive or), again and again along it.
    They are uniform, and any two numbers, of one piece or of two, are independent: a linear function of the rounding
    errors of a weight has the mean and the variance that it has with numbers drawn afresh, a quadratic one the mean.
    Four numbers may depend.

    Args:
        gen: what is drawn from.
    """

    def __init__(self, gen: torch.Generator) -> None:
        self.gen = gen
        self.words = torch.empty(0, PATTERN, dtype=torch.int64)

    def like(self, X: Tensor, dtype: torch.dtype) -> Tensor:
        """Return integers of all values of a type in the shape of X, until the next call. They are only to be read."""
        rows = -(-X.numel() * dtype.itemsize // (8 * PATTERN))
        if rows > len(self.words):
            self.words = self._drawn(rows, X.device)
        else:
            self.words.bitwise_xor_(self._drawn(1, X.device))
        return self.words.view(-1).view(dtype)[: X.numel()].view(X.shape)

    def _drawn(self, rows: int, device: torch.device) -> Tensor:
        words = torch.empty(rows, PATTERN, dtype=torch.int64, device=device)
        return words.random_(-(2**63), None, generator=self.gen)


def with_float64(device: torch.device) -> torch.device:
    """Return where numbers of a device are drawn and decomposed in float64: there, but for MPS, which has none."""
    return torch.device("cpu") if device.type == "mps" else device


def float64(X: Tensor) -> Tensor:
    """Return numbers in float64, on the CPU where their device has none."""
    return X.to(with_float64(X.device), torch.float64)


def _uniform(shape: Sequence[int], gen: torch.Generator, device: torch.device) -> Tensor:
    return torch.rand(shape, generator=gen, dtype=torch.float64, device=device)


def uniform_stiefel(shape: torch.Size, gen: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Draw an orthonormal (..., m, r) matrix uniformly (Haar): QR of a Gaussian with the signs of diag(R) fixed."""
    Q, R = torch.linalg.qr(torch.randn(shape, generator=gen, dtype=torch.float32, device=device))
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
        gen: what is drawn from, on the device of the weights: nothing waits for it there.

    Returns:
        Indices (..., r), int64.
    """
    device = with_float64(weights.device)
    uniform = _uniform(weights.shape, gen, device).clamp_min_(torch.finfo(torch.float64).tiny)
    noise = -torch.log(-torch.log(uniform))
    filler = -1e30 - torch.arange(weights.shape[-1], dtype=torch.float64, device=device) * 1e25
    logs = float64(weights).log()
    keys = torch.where(logs.isneginf(), filler, logs + noise)
    return keys.topk(r, dim=-1).indices.sort(-1).values.to(weights.device)


def draw(weights: Tensor, r: int, gen: torch.Generator) -> Tensor:
    """Draw r of k indices with replacement, with probability proportional to `weights` (..., k); int64 (..., r).

    By inversion of the cumulative sums in float64, on the device.
    """
    sums = float64(weights).cumsum(-1)
    uniform = _uniform((*weights.shape[:-1], r), gen, sums.device) * sums[..., -1:]
    found = torch.searchsorted(sums, uniform, right=True)
    return found.clamp_max_(weights.shape[-1] - 1).to(weights.device)
