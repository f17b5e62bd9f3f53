"""MoRA's layer against matrices that say what its groups are, in float64."""

import math

import pytest
import torch
from torch import nn

from recipes.shared.baselines.mora import MoRALinear


def gathering(sharing, inputs, k):
    """E with gather(x) = E x: for types 1 and 2 (k, in)."""
    E = torch.zeros(k, inputs, dtype=torch.float64)
    if sharing == 1:
        for g in range(math.ceil(inputs / k) * k):
            E[g % k, g % inputs] += 1
    else:
        for g, members in enumerate(torch.arange(inputs).tensor_split(k)):
            E[g, members] = 1
    return E


def spreading(sharing, outputs, k):
    """E with spread(z) = E z: for types 1 and 2 (out, k)."""
    if sharing == 2:
        return gathering(2, outputs, k).T
    return torch.eye(k, dtype=torch.float64)[torch.arange(outputs) % k]


def rotation(b, k):
    """Rotary positions: coordinates j and j + k/2 turn by b 10000^(-2j/k)."""
    turn = torch.zeros(k, k, dtype=torch.float64)
    for j in range(k // 2):
        angle = b * 10000 ** (-2 * j / k)
        turn[j, j] = turn[j + k // 2, j + k // 2] = math.cos(angle)
        turn[j, j + k // 2], turn[j + k // 2, j] = -math.sin(angle), math.sin(angle)
    return turn


def written_out(M, sharing, outputs, inputs):
    k = len(M)
    if sharing != 6:
        return spreading(sharing, outputs, k) @ M @ gathering(sharing, inputs, k)
    pieces = math.ceil(inputs / k)
    identity = torch.eye(inputs, dtype=torch.float64)
    blocks = [M @ rotation(b, k) @ identity[torch.arange(b * k, b * k + k) % inputs] for b in range(pieces)]
    return torch.cat(blocks)[torch.arange(outputs) % (pieces * k)]


@pytest.mark.parametrize("sharing", [1, 2, 6])
@pytest.mark.parametrize(
    ("outputs", "inputs", "rank"), [(40, 24, 2), (24, 40, 3), (32, 32, 4), (9, 50, 1), (10, 6, 8)]
)
def test_the_adapter_is_the_matrix_that_the_paper_describes(sharing, outputs, inputs, rank):
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs).double()
    layer = MoRALinear(linear, rank=rank, sharing=sharing, dropout=0.0)
    k = math.floor(math.sqrt((outputs + inputs) * rank))
    M = nn.init.normal_(layer.square_factor).detach()
    assert len(M) == (k if sharing != 6 else k - k % 2)
    delta = written_out(M, sharing, outputs, inputs)
    x = torch.randn(3, 2, inputs, dtype=torch.float64)
    # angles are in fp32, and so is the merged matrix: sums of up to 50 terms
    torch.testing.assert_close(layer(x), linear(x) + x @ delta.T, atol=1e-4, rtol=0)
    torch.testing.assert_close(layer.delta().double(), delta, atol=1e-4, rtol=0)
    if sharing == 1:  # dL/dM = E_outᵀ G E_inᵀ
        dy = torch.randn(3, 2, outputs, dtype=torch.float64)
        layer(x).backward(dy)
        G = torch.einsum("abi,abj->ij", dy, x)
        expected = spreading(1, outputs, k).T @ G @ gathering(1, inputs, k).T
        torch.testing.assert_close(layer.square_factor.grad, expected, atol=1e-9, rtol=0)


def test_rotation_reaches_full_rank_and_sharing_does_not():
    ranks = {}
    for sharing in (1, 6):
        layer = MoRALinear(nn.Linear(64, 64), rank=2, sharing=sharing, dropout=0.0)
        nn.init.normal_(layer.square_factor)
        ranks[sharing] = torch.linalg.matrix_rank(layer.delta().detach().double(), rtol=1e-5).item()
    assert ranks == {1: 16, 6: 64}  # k = 16, and all


def test_a_restart_changes_the_type_and_a_checkpoint_knows_it():
    layer = MoRALinear(nn.Linear(12, 20), rank=2, sharing=1, dropout=0.0)
    nn.init.normal_(layer.square_factor)
    x = torch.randn(4, 12)
    before = layer(x)
    layer.restart_()
    assert layer.sharing == 2 and not layer.square_factor.any()
    torch.testing.assert_close(layer(x), before, atol=1e-5, rtol=0)  # fp32, sums of 12
    other = MoRALinear(nn.Linear(12, 20), rank=2, sharing=1, dropout=0.0)
    other.load_state_dict(layer.state_dict())
    assert other.sharing == 2
    layer.restart_()
    assert layer.sharing == 1
