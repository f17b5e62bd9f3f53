"""What the references of tracked subspaces must satisfy by themselves, without the package. float64 throughout."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from references.base import LowRank, dominant
from references.ldadam import BlockPower, ErrorFeedback, LDAdam
from references.momentum import Momentum
from references.online import OnlineSubspace, error_gradient
from references.streams import ROUNDING, SHAPES, TALL, WIDE, finish, randn, same, stream
from references.subtrack import SubTrack, geodesic


SETTING = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95}


# ---- SubTrack -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_the_line_search_never_loses_energy_and_is_the_best_angle(shape):
    ref = SubTrack(randn(*shape), rank=3, gap=1)
    angles = torch.linspace(0, torch.pi, 50)
    gradients = stream(shape, 15)
    ref.step(gradients[0])
    for G in gradients[1:]:
        before = ref.P
        ref.step(G)
        wide = ref.wide(G)
        assert (ref.P.T @ wide).norm() >= (before.T @ wide).norm() * (1 - ROUNDING)
        same(ref.P.T @ ref.P, torch.eye(3, dtype=torch.float64))
        A = before.T @ wide
        sigma = float(torch.linalg.matrix_norm((wide - before @ A) @ A.T, 2))
        grid = [(geodesic(before, wide, rule="raw", eta=a / (2 * sigma)).T @ wide).norm() for a in angles.tolist()]
        assert (ref.P.T @ wide).norm() >= max(grid) * (1 - ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
def test_accumulation_turns_by_the_mean_since_the_last_refresh(shape):
    gradients = stream(shape, 9)
    ref = SubTrack(randn(*shape), rank=3, gap=4, accumulate=True)
    finish(ref, gradients[:8])  # bases at 0 and 4, the second from the gradients 1 to 4
    first = dominant(ref.wide(gradients[0]), 3, None)
    second = geodesic(first, ref.wide(torch.stack(gradients[1:5]).mean(0)), rule="auto", eta=1.0)
    same(ref.P, second)
    ref.step(gradients[8])
    same(ref.P, geodesic(second, ref.wide(torch.stack(gradients[5:9]).mean(0)), rule="auto", eta=1.0))


def test_a_step_of_the_printed_equation_goes_uphill_and_raw_the_way_down():
    G = stream(WIDE)[0]
    P = torch.linalg.qr(randn(6, 3))[0]
    error = [
        float((G - Q @ Q.T @ G).norm())
        for Q in (
            P,
            geodesic(P, G, rule="raw", eta=0.01),
            geodesic(P, G, rule="raw", eta=0.01, direction="printed"),
        )
    ]
    assert error[1] < error[0] < error[2]


def test_the_tangent_of_the_geodesic_is_minus_the_leading_part_of_the_gradient_of_the_error():
    G, eta = stream(WIDE)[0], 1e-6
    P = torch.linalg.qr(randn(6, 3))[0].requires_grad_()
    A = torch.linalg.lstsq(P, G).solution  # eq. 3: the inner minimum
    [slope] = torch.autograd.grad(((P @ A.detach() - G) ** 2).sum(), P)  # eq. 4
    U, S, Vh = torch.linalg.svd(slope)
    P = P.detach()
    moved = (geodesic(P, G, rule="raw", eta=eta) - P) / eta
    same(moved, -S[0] * torch.outer(U[:, 0], Vh[0]), 1e-5)  # second order in eta


@pytest.mark.parametrize("rule, eta", [("auto", 1.0), ("normalized", 0.3)])
def test_scaling_the_gradients_leaves_the_bases(rule, eta):
    small, large = (SubTrack(randn(*TALL), rank=3, gap=2, rule=rule, eta=eta) for _ in range(2))
    for G in stream(TALL):
        small.step(G)
        large.step(1000 * G)
        same(small.P, large.P)


def test_the_change_of_basis_is_the_identity_plus_a_rank_one_part():
    G, P = stream(WIDE)[0], torch.linalg.qr(randn(6, 3))[0]
    C = geodesic(P, G, rule="auto", eta=1.0).T @ P  # I + (cos theta - 1) v v^T
    values, v = torch.linalg.eigh(C)
    same(values[1:], torch.ones(2, dtype=torch.float64))
    same(C, torch.eye(3, dtype=torch.float64) + (values[0] - 1) * torch.outer(v[:, 0], v[:, 0]))


def test_at_full_rank_the_basis_stays():
    ref = SubTrack(randn(*TALL), rank=6, gap=1)
    gradients = stream(TALL)
    ref.step(gradients[0])
    first = ref.P
    finish(ref, gradients[1:])
    assert torch.equal(ref.P, first)


# ---- LDAdam ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_error_feedback_loses_nothing(shape):
    """With V held at 1: sum_s P_s M_s + b1 / (1 - b1) P_t M_t + E_t = sum_s G_s."""
    ref = LDAdam(randn(*shape), rank=2)
    taken = seen = 0.0
    for G in stream(shape, 20):
        ref.step(G)
        taken, seen = taken + ref.P @ ref.M, seen + ref.wide(G)
        same(taken + ref.beta1 / (1 - ref.beta1) * ref.P @ ref.M + ref.E, seen)


def test_at_full_rank_no_error_is_left():
    ref = LDAdam(randn(*WIDE), rank=6)
    for G in stream(WIDE):
        ref.step(G)
        assert ref.E.norm() < ROUNDING


def test_the_first_tracked_basis_is_one_power_step_on_what_momentum_and_error_leave():
    """After one step M / c1 is R, hence b = rho P P^T G_0 + (1 - rho)(G_1 + (I - P P^T) G_0)."""
    ref, (G0, G1) = LDAdam(randn(*WIDE), rank=2, rho=0.7), stream(WIDE, 2)
    ref.step(G0)
    P = ref.P
    ref.step(G1)
    inside = P @ P.T @ G0
    b = 0.7 * inside + 0.3 * (G1 + G0 - inside)
    Q = torch.linalg.qr(b @ b.T @ P)[0]
    same(ref.P @ ref.P.T, Q @ Q.T)
    assert ((ref.P.T @ P).diagonal() >= 0).all()


def test_without_error_feedback_it_is_galore_adam_in_its_bases_with_both_moments_carried_along():
    W, bases = randn(*TALL), []
    lda = LDAdam(W, rank=2, error_feedback=False, **SETTING)
    loop = LowRank(W, rank=2, gap=1, choose=lambda G, r, old: bases[-1], on_refresh="rotate_variance", **SETTING)
    for G in stream(TALL):
        lda.step(G)
        bases.append(lda.P)
        loop.step(G)
        same(lda.weight, loop.weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("feedback", [True, False])
def test_its_two_parts_about_the_common_loop_are_its_printed_algorithm(shape, feedback):
    @dataclass
    class Parts(ErrorFeedback, BlockPower):
        pass

    W, gradients = randn(*shape), stream(shape)
    parts = Parts(W, rank=2, gap=1, on_refresh="rotate_variance", rho=0.7, **SETTING)
    parts.feedback = feedback
    same(finish(parts, gradients), finish(LDAdam(W, rank=2, rho=0.7, error_feedback=feedback, **SETTING), gradients))


def test_without_error_feedback_the_error_stays_zero_and_the_bases_differ():
    on, off = LDAdam(randn(*WIDE), rank=2), LDAdam(randn(*WIDE), rank=2, error_feedback=False)
    gradients = stream(WIDE)
    finish(on, gradients)
    finish(off, gradients)
    assert off.E.norm() == 0 < on.E.norm()
    same(off.P.T @ off.P, torch.eye(2, dtype=torch.float64))
    assert (on.P - off.P).norm() > 1e-3


# ---- Online Subspace Descent ----------------------------------------------------------------------------------------


def test_the_closed_form_is_autograds_gradient():
    G, P = stream(WIDE)[0], randn(6, 3).requires_grad_()  # not orthonormal, as it becomes
    Gh = G / G.norm()
    [slope] = torch.autograd.grad(((P @ P.T @ Gh - Gh) ** 2).sum(), P)
    same(error_gradient(P.detach(), G), slope)


def test_the_basis_is_moved_by_torchs_adamw_after_the_weight_is_written():
    W, gradients = randn(*TALL), stream(TALL)
    ref = OnlineSubspace(W, rank=3, gap=50, moments=Momentum(), beta1=0.0)
    P = torch.nn.Parameter(dominant(gradients[0].T, 3, None))
    opt = torch.optim.AdamW([P], lr=1 / 50)  # its defaults
    for t, G in enumerate(gradients):
        before = ref.weight
        ref.step(G)
        with torch.no_grad():
            same(before - ref.weight, 1e-3 * 0.25 * (P @ P.T @ G.T).T)
        if t:
            Gh = G.T / G.norm()
            opt.zero_grad()
            ((P @ P.T @ Gh - Gh) ** 2).sum().backward()
            opt.step()
        same(ref.P, P.detach())
