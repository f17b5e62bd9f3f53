"""What is made of the part of a gradient that a subspace leaves out, and what is done with spikes before."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from comparing import STEPS, TOLERANCE, agree, optimizer, references
from references.spikes import without_spikes
from streams import STACK, TALL, WIDE, displacement, finish, gradients, orthonormal, run, weight, wide


# ---- Alice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_at_full_rank_alice_is_adam_on_the_rotated_gradient(shape, correct_bias):
    """With r = m nothing is left over and nothing drawn: in its basis it is Adam at its betas."""
    p, stream = weight(shape), gradients(shape, 12)
    start = p.detach().clone()
    opt = optimizer(p, "alice_adamw", rank=6, scale=1.0, betas=(0.9, 0.9), weight_decay=0.0, correct_bias=correct_bias)
    for _ in run(opt, p, stream[:4]):
        pass
    P = opt.state[p]["basis"].double()
    X, M, V = wide(start).double(), 0.0, 0.0
    for t, G in enumerate(stream[:4], 1):
        R = P.T @ wide(G).double()
        M, V = 0.9 * M + 0.1 * R, 0.9 * V + 0.1 * R * R
        c1, c2 = (1 - 0.9**t, 1 - 0.9**t) if correct_bias else (1.0, 1.0)
        X = X - 1e-2 * P @ (M / c1 / ((V / c2).sqrt() + 1e-2))
    assert displacement(X, wide(p), wide(start)) < TOLERANCE


@pytest.mark.parametrize("name, options", [
    ("alice_adamw", {}),
    ("lowrank", {"subspace": "i3s", "reconstruction": "compensation"}),
    ("lowrank", {"subspace": "grassmann", "reconstruction": "compensation"}),
    ("lowrank", {"subspace": "random", "moments": "muon", "reconstruction": "compensation"}),
])  # fmt: skip
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_columns_outside_the_subspace_have_unit_rms_once_their_size_is_stationary(shape, name, options):
    """The same gradient at every step: p is c, and (G - P R) diag(d) has columns of norm sqrt(m - r)."""
    G, p = gradients(shape, 1)[0], weight(shape)
    opt = optimizer(p, name, compensation=1.0, scale=1.0, weight_decay=0.0, limiter=1e9, **options)
    finish(opt, p, [G] * 3)
    before = p.detach().clone()
    finish(opt, p, [G])
    P = opt.state[p]["basis"].double()
    step = wide(before - p).double() / 1e-2
    E = step - P @ (P.T @ step)  # what has been done outside
    residual = wide(G).double() - P @ (P.T @ wide(G).double())
    m, r = P.shape
    torch.testing.assert_close(E.square().sum(0) / (m - r), torch.ones(E.shape[1]).double(), rtol=1e-4, atol=0)
    # the engine's product form is (G - P R) diag(d), without forming it
    torch.testing.assert_close(E, residual / residual.norm(dim=0) * sqrt(m - r), rtol=1e-4, atol=1e-4)


def test_a_column_with_nothing_outside_gets_nothing():
    """Rounding noise is not blown up to unit RMS."""
    gen = torch.Generator().manual_seed(0)
    G = (orthonormal(6, 3, gen) @ torch.randn(3, 11, generator=gen, dtype=torch.float64)).float()  # of rank 3
    p, q = weight(WIDE), weight(WIDE)
    a = finish(optimizer(p, "alice_adamw", leading=3, scale=0.25), p, [G] * 4)
    b = finish(optimizer(q, "galore_dominant_adamw", scale=0.25, on_refresh="keep"), q, [G] * 4)
    assert displacement(a, b, weight(WIDE)) < 1e-4


@pytest.mark.parametrize("leading, tracking", [(0, False), (2, False), (3, False), (2, True)])
@pytest.mark.parametrize("shape", [WIDE, STACK])
def test_alices_options(shape, leading, tracking):
    agree("alice_adamw", shape, leading=leading, tracking=tracking, tracking_decay=0.8)
    agree("alice_muon", shape, leading=leading, tracking=tracking, compensation=0.2)


def test_new_vectors_are_outside_of_all_leading_ones_and_orthonormal():
    p = weight((16, 40))
    opt = optimizer(p, "alice_adamw", rank=8, leading=3, update_proj_gap=1)
    for _ in run(opt, p, gradients((16, 40), 12)):
        P = opt.state[p]["basis"].double()
        torch.testing.assert_close(P.T @ P, torch.eye(8).double(), rtol=0, atol=1e-6)


# ---- FRUGAL ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("free", ["sign", "column_norm"])
@pytest.mark.parametrize("shape", [WIDE, TALL, STACK])
def test_frugal_with_both_of_its_rules(shape, free):
    agree("frugal_adamw", shape, free=free, free_scale=0.3)


@pytest.mark.parametrize("free", ["sign", "column_norm"])
def test_what_frugal_does_outside_keeps_no_state(free):
    """After a refresh at which its moments are cleared it steps as if it had just begun."""
    p, q = weight(WIDE), weight(WIDE)
    stream = gradients(WIDE, 10)
    first = optimizer(p, "frugal_adamw", free=free, update_proj_gap=5, weight_decay=0.0)
    finish(first, p, stream[:5])
    middle = p.detach().clone()
    finish(first, p, stream[5:])
    finish(optimizer(q, "frugal_adamw", free=free, update_proj_gap=5, weight_decay=0.0), q, stream[5:])
    # signs of the second basis are aligned with the first's, which turns a direction and its moments around together
    assert displacement(p - middle, q - weight(WIDE), torch.zeros(WIDE)) < TOLERANCE


@pytest.mark.parametrize("free", ["sign", "column_norm"])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_rounding_noise_outside_is_not_stepped_along(shape, free):
    """Gradients of fewer directions than the rank, as few tokens give: then it is GaLore whose moments are cleared."""
    gen = torch.Generator().manual_seed(0)
    U, W = orthonormal(16, 3, gen), torch.randn(4, 3, 40, generator=gen, dtype=torch.float64)
    stream = [G if shape == (16, 40) else G.T for G in (U @ W).float()]
    p, q = weight(shape), weight(shape)
    a = finish(optimizer(p, "frugal_adamw", rank=4, free=free), p, stream)
    b = finish(optimizer(q, "galore_dominant_adamw", rank=4, scale=0.5, on_refresh="reset"), q, stream)
    assert displacement(a, b, weight(shape)) < TOLERANCE


# ---- SUMO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("moments", ["adam", "muon", "adafactor"])
@pytest.mark.parametrize("shape", [WIDE, TALL, STACK])
def test_a_residual_as_it_is(shape, moments, scale):
    """With Adam, whose bias correction is not the residual's."""
    agree("lowrank", shape, moments=moments, reconstruction="residual", scale=scale)


# ---- GrassWalk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [0.1, 1.0])
def test_a_walk_turns_a_basis_by_its_angle_and_no_more(angle):
    shape = (24, 40)
    p = weight(shape)
    opt = optimizer(p, "grasswalk_adamw", rank=6, update_proj_gap=1, angle=angle)
    before = None
    for _ in run(opt, p, gradients(shape, 40)):
        P = opt.state[p]["basis"].double().clone()
        if before is not None:
            smallest = torch.linalg.svdvals(before.T @ P)[-1].clamp(max=1).acos()
            assert abs(float(smallest) - angle) < 1e-3  # acos near 1 of numbers known to 1e-7
        before = P
    torch.testing.assert_close(before.T @ before, torch.eye(6).double(), rtol=0, atol=1e-6)  # after 40 steps


def test_the_bases_of_both_sides_go_their_own_ways():
    """A draw that looks at no gradient is another on the other side; the right basis walks where the left is whole."""
    p = weight((8, 8))
    opt = optimizer(p, "galore_random_adamw", rank=3, proj_type="full")
    finish(opt, p, gradients((8, 8), 1))
    left, right = opt.state[p]["basis"], opt.state[p]["right_basis"]
    assert (left - right).norm() > 0.1 * left.norm()
    p = weight((4, 8))
    opt = optimizer(p, "lowrank", rank=4, subspace="grass_walk", proj_type="full", update_proj_gap=1, angle=0.3)
    before = None
    for _ in run(opt, p, gradients((4, 8), 4)):
        Q = opt.state[p]["right_basis"].double().clone()
        if before is not None:
            angle = torch.linalg.svdvals(before.T @ Q)[-1].clamp(max=1).acos()
            assert abs(float(angle) - 0.3) < 1e-3
        before = Q


# ---- spikes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "galore_i3s_adamw",
        "fira_adamw",
        "ldadam",
        "alice_adamw",
        "full_adamw",
        "flora_adafactor",
        "online_subspace_adamw",
    ],
)
@pytest.mark.parametrize("shape", [WIDE, TALL, STACK])
def test_stable_spam_is_its_papers_conditioning_before_the_method(name, shape):
    stream = gradients(shape, STEPS)
    stream[6][..., 2, 3] = 200.0  # a spike in one element, and a gradient that is large as a whole
    stream[9] *= 30.0
    p = weight(shape)
    opt, start = optimizer(p, name, stable_spam=True), p.detach().clone()
    refs = references(p, opt)
    by_matrix = [without_spikes(list(one)) for one in zip(*(G.reshape(-1, *shape[-2:]) for G in stream), strict=True)]
    for _ in run(opt, p, stream):
        pass
    for ref, conditioned in zip(refs, by_matrix, strict=True):
        for G in conditioned:
            ref.step(G)
    assert displacement(torch.stack([ref.weight for ref in refs]).reshape(p.shape), p, start) < TOLERANCE
    plain = weight(shape)
    assert displacement(finish(optimizer(plain, name), plain, stream), p, start) > 100 * TOLERANCE
