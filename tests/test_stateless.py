"""Rules that keep next to nothing: RACS' fixed point, the norms of SinkGD and SWAN."""

from __future__ import annotations

import pytest
import torch
from comparing import agree, optimizer
from streams import STACK, TALL, WIDE, finish, gradients, weight, wide

from hf_lowrank.methods.moments.racs import RACS
from hf_lowrank.tensors.sums import alone


def first_step(name, shape, **options):
    """What a method does with a first gradient, with the weight's outputs as columns."""
    G, p = gradients(shape, 1)[0], weight(shape)
    opt = optimizer(p, name, lr=1.0, scale=1.0, weight_decay=0.0, **options)
    return (weight(shape) - finish(opt, p, [G])).detach().double().mT, G.double().mT


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_racs_fixed_point_is_balanced_with_the_square_of_the_gradient(shape, size):
    """diag(q) (R∘R) diag(s) has the sums of rows and of columns that diag(q) q s^T diag(s) has."""
    R = gradients(shape, 1)[0].double() * size
    q, s = alone(RACS(iterations=200)._fixed_point(R.square()))
    balanced, rank_one = q[:, None] * R.square() * s, q[:, None] * (q[:, None] * s) * s
    for axis in (0, 1):
        torch.testing.assert_close(balanced.sum(axis), rank_one.sum(axis), rtol=1e-6, atol=0)
    # it is the nearest matrix of rank 1: the leading singular triple of R∘R
    torch.testing.assert_close(q.norm() * s.norm(), torch.linalg.matrix_norm(R.square(), 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("shape", [WIDE, STACK])
def test_options(shape, iterations):
    agree("racs", shape, iterations=iterations, limiter=1.1)
    agree("sinkgd", shape, iterations=iterations)
    agree("swan", shape, orthogonalize="exact")


@pytest.mark.parametrize("name", ["racs", "sinkgd"])
@pytest.mark.parametrize("factor", [1e-9, 1e9])
def test_the_size_of_the_gradient_does_not_matter(name, factor):
    stream, p, q = gradients(TALL, 8), weight(TALL), weight(TALL)
    a = finish(optimizer(p, name, limiter=1.01) if name == "racs" else optimizer(p, name), p, stream)
    b = finish(optimizer(q, name), q, [G * factor for G in stream])
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # the factor rounds every entry


@pytest.mark.parametrize("name, size", [("scale_sgd", 1.0), ("rmnp", 0.2)])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_outputs_have_one_rms(shape, name, size):
    step, _ = first_step(name, shape)
    torch.testing.assert_close(step.square().mean(0).sqrt(), size * torch.ones(shape[0]).double(), rtol=1e-5, atol=0)


def test_rmnp_is_muons_step_where_outputs_are_orthogonal():
    U = torch.linalg.qr(torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    G = (U * torch.arange(1.0, 7)).mT.float()  # (outputs, inputs), outputs of different sizes
    p, q = weight((6, 9)), weight((6, 9))
    a = finish(optimizer(p, "rmnp", weight_decay=0.0), p, [G])
    b = finish(optimizer(q, "full_muon", weight_decay=0.0, orthogonalize="exact"), q, [G])
    # both have outputs of norm 0.2 sqrt(9), the longer side
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_sinkgd_converges_to_rows_and_columns_of_unit_rms(shape):
    step, _ = first_step("sinkgd", shape, iterations=300)
    for axis in (0, 1):
        rms = step.square().mean(axis).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)  # its convergence is linear


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_with_std_racs_starts_on_the_short_side_as_the_paper_does(shape):
    """arXiv 2502.07752, eq. 16 and Algorithm 1, whose matrices have m <= n: the first step, before the limiter."""
    G, p = gradients(shape, 1)[0], torch.nn.Parameter(torch.zeros(shape))
    N = -finish(optimizer(p, "racs", lr=1.0, scale=1.0, proj_type="std", weight_decay=0.0), p, [G]).double()
    A, q = wide(G).double().square(), torch.ones(min(shape)).double()
    for _ in range(5):
        s = A.T @ q / q.square().sum()
        q = A @ s / s.square().sum()
    torch.testing.assert_close(wide(N), wide(G).double() / (q[:, None] * s).sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["racs", "rmnp", "sinkgd", "swan", "full_muon", "full_normuon", "full_sm3"])
def test_rows_and_columns_of_zeros_stay_so_and_harm_nothing(name):
    G = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    G[2], G[:, 3] = 0, 0
    p = weight((5, 6))
    finish(optimizer(p, name, weight_decay=0.0), p, [torch.zeros(5, 6), G, torch.zeros(5, 6), G])
    assert p.isfinite().all()
    moved = p != weight((5, 6))
    assert moved.any() and (name == "swan" or not (moved[2].any() or moved[:, 3].any()))  # which subtracts a mean


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_swans_step_is_orthogonal_and_of_adams_size(shape):
    step, _ = first_step("swan", shape, orthogonalize="exact")
    values = torch.linalg.svdvals(step) / (0.2 * max(shape) ** 0.5)
    assert (values[:-1] - 1).abs().max() < 1e-3 and (values[-1] - 1).abs() < 1e-3
