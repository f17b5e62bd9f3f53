"""SLTrain's layer against its formulas in float64, and what it keeps for the backward pass."""

import pytest
import torch
from torch import nn

from hf_lowrank.tensors.random import generator
from recipes.shared.baselines.sparse_low_rank import SparseLowRankLinear


def layer_of(out, inside, *, rank=3, alpha=6.0, density=0.1, dtype=torch.float64):
    torch.manual_seed(0)
    linear = nn.Linear(inside, out, dtype=dtype)
    layer = SparseLowRankLinear(linear, rank=rank, alpha=alpha, density=density, gen=generator(5, 0))
    nn.init.normal_(layer.up_factor)  # zero at the start
    return layer


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)])
def test_output_and_gradients_are_those_of_the_formulas(shape):
    layer = layer_of(*shape)
    B, A, v = (p.detach() for p in (layer.up_factor, layer.down_factor, layer.sparse_values))
    S = torch.zeros(shape, dtype=torch.float64)
    S.view(-1)[layer.support.long()] = v
    W, s = 2.0 * B @ A + S, 2.0
    x = torch.randn(5, 4, shape[1], dtype=torch.float64, requires_grad=True)
    dy = torch.randn(5, 4, shape[0], dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    G = torch.einsum("abi,abj->ij", dy, x.detach())
    found = (y, layer.product().weight, x.grad, layer.up_factor.grad, layer.down_factor.grad, layer.sparse_values.grad)
    expected = (x @ W.T + layer.bias, W, dy @ W, s * G @ A.T, s * B.T @ G, G.flatten()[layer.support.long()])
    for one, other in zip(found, expected, strict=True):
        # products of 4 to 20 numbers in another order, the merged weight by way of fp32
        tolerance = 1e-12 if one.requires_grad is False or one is y else 1e-6
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_the_start_and_the_places_are_those_of_the_paper():
    torch.manual_seed(0)
    linear = nn.Linear(40, 60, bias=False)
    layer = SparseLowRankLinear(linear, rank=4, alpha=8.0, density=0.05, gen=generator(5, 0))
    places, W = layer.support, layer.product().weight
    assert len(places.unique()) == len(layer.sparse_values) == 120 and places.dtype == torch.int32
    assert (W != 0).sum() == 120 and torch.equal(W.flatten()[places.long()], layer.sparse_values)  # W = S
    for drawn in (layer.down_factor, layer.sparse_values):
        assert 0.9 * 40**-0.5 < drawn.abs().max() <= 40**-0.5
    again = SparseLowRankLinear(linear, rank=4, alpha=8.0, density=0.05, gen=generator(5, 0))
    other = SparseLowRankLinear(linear, rank=4, alpha=8.0, density=0.05, gen=generator(5, 1))
    assert torch.equal(again.support, places) and not torch.equal(other.support, places)


def test_the_rank_is_not_bounded_by_that_of_the_factors():
    assert torch.linalg.matrix_rank(layer_of(30, 30, rank=2, density=0.2).product().weight) > 10


def test_no_matrix_is_kept_for_the_backward_pass():
    layer, kept = layer_of(64, 64, rank=2, density=0.05, dtype=torch.float32), []
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert sum(kept) < 64 * 64 and max(kept) < 64 * 64 / 8
    y.sum().backward()


def test_under_autocast_the_products_are_in_bf16_and_the_gradients_in_fp32():
    layer = layer_of(24, 16, dtype=torch.float32)
    x = torch.randn(6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    exact = torch.ones(6, 24).T @ x @ layer.down_factor.detach().T * 2.0
    assert y.dtype == torch.bfloat16 and layer.up_factor.grad.dtype == torch.float32
    # bf16 has 8 bits, and the sums here have 16 terms
    torch.testing.assert_close(layer.up_factor.grad, exact, atol=0.05 * exact.abs().max().item(), rtol=0)
