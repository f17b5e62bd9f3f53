"""Muon: the direction is the polar factor of the momentum, however badly conditioned that is."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from comparing import agree
from streams import STACK, TALL, WIDE, displacement, finish, gradients, optimizer, orthonormal

from hf_lowrank import LowRankOptimizer, param_groups


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


@pytest.mark.parametrize("shape", [(8, 12), (12, 8), (9, 9)])
def test_sumo_is_its_algorithm(shape):
    """arXiv 2505.24749, Algorithm 1 as printed, but for its limiter: at defaults, so these are the paper's too.

    The factor is that of its section 3.2, sqrt(max(m, n)), with the 0.2 of the paper that it follows there.
    """
    lr, mu, decay, K, r = 1e-2, 0.9, 0.1, 3, 3
    grads, p = gradients(shape, 8), torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    start, flip = p.detach().clone(), shape[0] >= shape[1]
    options = {"params": [p], "rank": r, "update_proj_gap": K, "weight_decay": decay}
    W, Q, M = (start.T if flip else start).double(), None, None
    opt = LowRankOptimizer([options], "sumo", lr=lr)
    for t, gradient in enumerate(grads):
        p.grad = gradient.clone()
        opt.step()
        G = (gradient.T if flip else gradient).double()
        if t % K == 0:
            new = torch.linalg.svd(G, full_matrices=False)[0][:, :r]
            M = torch.zeros(r, G.shape[1]).double() if M is None else new.T @ Q @ M
            Q = new
        inside = Q.T @ G
        M = mu * M + inside
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        O = 0.2 * sqrt(max(shape)) * U @ Vh  # noqa: E741
        W = W - lr * (G - Q @ (inside - O)) - lr * decay * W
    assert displacement(p.detach(), W.T if flip else W, start) < 1e-5  # bases and products in fp32


@pytest.mark.parametrize("shape", [WIDE, TALL, STACK])
@pytest.mark.parametrize("how", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", ["galore_i3s_muon", "fira_muon"])
def test_options(name, nesterov, how, shape):
    agree(name, shape, nesterov=nesterov, on_refresh=how)


@pytest.mark.parametrize("shape", [WIDE, TALL, STACK])
@pytest.mark.parametrize("how", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("name", ["galore_i3s_muon", "fira_muon", "alice_muon", "full_muon", "full_normuon"])
def test_rows_in_units_of_their_size_make_the_same_steps(name, how, shape):
    """The references know nothing of the units, so nothing but rounding may depend on them."""
    options = {} if name.startswith("full") else {"on_refresh": how}
    agree(name, shape, row_scales=True, orthogonalize="exact", **options)


def test_rows_of_zeros_have_no_size():
    G, p = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.nn.Parameter(torch.zeros(5, 6))
    G[:, 2] = 0  # an input that is never there; rows are inputs
    opt = optimizer(p, "full_muon", lr=1.0, row_scales=True, weight_decay=0.0)
    finish(opt, p, [torch.zeros(5, 6), G, G])
    assert p.isfinite().all() and not p[:, 2].any() and p[:, 3].all()
    assert opt.state[p]["row_scale"][2] == 0
    rms = opt.state[p]["exp_avg"].square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.tensor([1.0, 1, 0, 1, 1, 1]))


def test_codes_of_four_bits_hold_rows_in_units_of_their_size_better():
    """Gradients of noise whose rows and columns have sizes from 1 to 30; 40 steps of a momentum of 0.9.

    A code's error comes back, times 0.9, at every step, and with one scale for 128 entries of a column small rows have
    no level near them.
    """
    gen = torch.Generator().manual_seed(0)
    rows, columns = torch.logspace(0, 1.5, 96)[torch.randperm(96, generator=gen)], torch.logspace(0, 1.5, 128)
    grads = [torch.randn(128, 96, generator=gen) * columns[:, None] * rows for _ in range(40)]

    def last_step(**options):
        p = torch.nn.Parameter(torch.zeros(128, 96))
        opt = optimizer(p, "full_muon", lr=1.0, weight_decay=0.0, orthogonalize="exact", **options)
        before = finish(opt, p, grads[:-1])
        return finish(opt, p, grads[-1:]) - before

    exact = last_step()
    found = [last_step(state_format="4bit", row_scales=scaled) for scaled in (False, True)]
    plain, scaled = (float((N * exact).sum() / N.norm() / exact.norm()) for N in found)
    assert scaled > 0.95 and plain < 0.8  # cosines with the step of a momentum in fp32: 0.964, 0.751


@pytest.mark.parametrize("name", ["full_muon", "muon_4bit", "full_normuon", "rmnp", "galore_i3s_muon", "alice_muon"])
def test_the_momentum_of_matrices_may_be_another_than_that_of_all_else(name):
    """Of matrices as with those betas, of vectors as with their own."""
    ends = []
    for betas, options in (((0.9, 0.99), {"momentum": 0.6}), ((0.6, 0.99), {}), ((0.9, 0.99), {})):
        net = torch.nn.Linear(12, 20)
        with torch.no_grad():
            net.weight.zero_()
            net.bias.zero_()
        opt = LowRankOptimizer(param_groups(net, method=name, rank=4, **options), name, lr=1e-2, betas=betas)
        for G in gradients((20, 12), 5):
            net.weight.grad, net.bias.grad = G.clone(), G.sum(1)
            opt.step()
        ends.append(net)
    told, of_betas, usual = ends
    assert torch.equal(told.weight, of_betas.weight) and torch.equal(told.bias, usual.bias)
    assert not torch.equal(told.weight, usual.weight) and not torch.equal(told.bias, of_betas.bias)
