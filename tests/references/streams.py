"""Gradients and comparisons for the tests of the references. float64."""

from __future__ import annotations

import torch
from torch import Tensor

from references.base import Matrix


WIDE, TALL, SQUARE = (6, 11), (11, 6), (7, 7)
SHAPES = [WIDE, TALL, SQUARE]
ROUNDING = 1e-9  # some hundred float64 operations with factors up to 1e3


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stream(shape: tuple[int, int], steps: int = 12, *, seed: int = 1) -> list[Tensor]:
    """A matrix of singular values 1, 1/2, 1/4, ... whose left vectors turn, and noise."""
    k = min(shape)
    U, V = (torch.linalg.qr(randn(d, k, seed=seed + i))[0] for i, d in enumerate(shape))
    turn = randn(k, k, seed=3)
    gradients = []
    for t in range(steps):
        left = U @ torch.matrix_exp(0.1 * t * (turn - turn.T))
        gradients.append(left * 2.0 ** -torch.arange(k) @ V.T + 0.05 * randn(*shape, seed=50 + t))
    return gradients


def finish(ref: Matrix, gradients: list[Tensor]) -> Tensor:
    for G in gradients:
        ref.step(G)
    return ref.weight


def same(a: Tensor, b: Tensor, tolerance: float = ROUNDING) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
