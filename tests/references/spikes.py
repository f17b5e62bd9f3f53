"""Stable-SPAM (arXiv 2502.17055, Algorithm 1): spikes clipped and the norm levelled, before any optimizer."""

from __future__ import annotations

from torch import Tensor


def without_spikes(gradients: list[Tensor], *, gammas: tuple[float, float, float] = (0.7, 0.9, 0.999)) -> list[Tensor]:
    """gamma_1, gamma_2: running means of the norm and its square; gamma_3: of the largest entry."""
    m = v = largest = 0.0
    found = []
    for t, gradient in enumerate(gradients, 1):
        G = gradient.double()
        top = float(G.abs().max())
        largest = gammas[2] * largest + (1 - gammas[2]) * top
        theta = largest / (1 - gammas[2] ** t)
        G = G.where(G.abs() <= theta, G / top * theta)
        norm = float(G.norm())
        m, v = gammas[0] * m + (1 - gammas[0]) * norm, gammas[1] * v + (1 - gammas[1]) * norm**2
        size = (m / (1 - gammas[0] ** t)) / ((v / (1 - gammas[1] ** t)) ** 0.5 + 1e-8)
        found.append(G / norm * size)
    return found
