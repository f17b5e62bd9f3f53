"""Muon: the direction is the polar factor of the momentum, however badly conditioned that is."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from comparing import agree
from streams import STACK, TALL, WIDE, finish, optimizer, orthonormal


def singular_values(sigma, shape, method="galore_dominant_muon"):
    """Of N, brought back to 1, for a first gradient with singular values sigma (one step from zero, lr 1)."""
    k, gen = len(sigma), torch.Generator().manual_seed(0)
    G = orthonormal(shape[0], k, gen) @ torch.diag(torch.as_tensor(sigma).double()) @ orthonormal(shape[1], k, gen).T
    p = torch.nn.Parameter(torch.zeros(shape))
    N = finish(optimizer(p, method, rank=min(shape), lr=1.0), p, [G.float()])
    return torch.linalg.svdvals(N.double()) / (0.2 * sqrt(max(shape)))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (16, 16)])
def test_singular_values_are_one_at_a_condition_of_1e4(shape, size):
    found = singular_values(size * torch.logspace(0, -4, 16), shape)
    assert (found - 1).abs().max() < 1e-3  # a basis of fp32, orthonormal to 1e-6, is between


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_directions_of_rounding_noise_are_dropped(shape):
    found = singular_values(torch.logspace(0, -2, 5), shape)
    assert (found[:5] - 1).abs().max() < 1e-3
    assert found[5:].max() < 1e-3  # blown up they would be 1


@pytest.mark.parametrize("shape", [WIDE, TALL, STACK])
@pytest.mark.parametrize("how", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", ["galore_i3s_muon", "fira_muon"])
def test_options(name, nesterov, how, shape):
    agree(name, shape, nesterov=nesterov, on_refresh=how)
