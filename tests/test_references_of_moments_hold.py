"""What the references of moments and steps must satisfy by themselves, without the package. float64 throughout."""

from __future__ import annotations

import pytest
import torch
from references.base import Adam, LowRank, Matrix, dominant
from references.factored import CAME, Adafactor, AdamMini
from references.golore import GoLore, uniform_stiefel
from references.momentum import Momentum
from references.natural import NaturalAdam
from references.scaled import Apollo
from references.sketch import FLora
from references.streams import ROUNDING, TALL, WIDE, finish, randn, same, stream


SETTING = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95}


# ---- GoLore, momentum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", [Adam(), Momentum()])
def test_golore_is_galore_before_the_switch_and_carries_its_momentum_at_every_refresh(moments):
    draws = []

    def draw(m, r):
        draws.append(uniform_stiefel(randn(m, r, seed=len(draws))))
        return draws[-1]

    W, gradients = randn(*TALL), stream(TALL)
    early = GoLore(W, rank=3, gap=4, switch=5, draw=draw, moments=moments)
    plain = LowRank(W, rank=3, gap=4, on_refresh="rotate", moments=moments)
    same(finish(early, gradients[:8]), finish(plain, gradients[:8]))  # bases at 0 and 4
    momentum, basis = early.moments.M, early.P
    early.step(gradients[8])
    assert len(draws) == 1
    same(early.P.abs(), draws[0].abs())
    R = early.P.T @ early.wide(gradients[8])
    same(early.moments.M, 0.9 * early.P.T @ basis @ momentum + 0.1 * R)


def test_momentum_sgd_without_momentum_is_projected_gradient_descent():
    W, G = randn(*WIDE), stream(WIDE)[0]
    ref = LowRank(W, rank=3, gap=10, moments=Momentum(), beta1=0.0, lr=0.1)
    ref.step(G)
    P = dominant(G, 3, None)
    same(ref.weight, W - 0.1 * P @ P.T @ G)


# ---- APOLLO ---------------------------------------------------------------------------------------------------------


def test_apollo_with_one_row_is_adam_while_signs_stay():
    """With m = 1 there is nothing to compress: ||N_j|| / ||R_j|| G_j = |N_j| sign(G_j)."""
    W, gradients = randn(1, 9), [randn(1, 9, seed=s).abs() + 0.1 for s in range(8)]
    identity = {"rank": 1, "choose": lambda G, r, old: torch.eye(1, dtype=torch.float64), "transposed": False}
    apollo, adam = Apollo(W, limiter=1e9, **identity), LowRank(W, **identity)
    same(finish(apollo, gradients), finish(adam, gradients), 1e-6)  # its own epsilon is 1e-8 of 0.1


def test_apollo_by_tensor_keeps_the_direction_of_the_gradient():
    W, G = randn(*WIDE), stream(WIDE)[0]
    ref = Apollo(W, rank=1, gap=10, by="tensor", scale=128.0)
    ref.step(G)
    moved = (W - ref.weight) / (W - ref.weight).norm()
    same(moved, G / G.norm())


def test_the_place_of_the_scale_about_the_limiter_does_not_matter_while_the_scale_is_constant():
    """The limiter compares norms of two steps; only its 1e-8 sees the scale."""
    W, gradients = randn(*WIDE), stream(WIDE, 30)
    options = {"rank": 2, "gap": 5, "scale": 128.0}
    front = Apollo(W, scale_front=True, **options)
    back = Apollo(W, **options)
    same(finish(front, gradients), finish(back, gradients), 1e-6)
    assert any(back.limited)


# ---- factored moments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", [Adafactor, CAME])
def test_factored_moments_of_a_rank_one_square_are_exact(moments):
    """R o R = x y^T is its own factorisation: the first Adafactor update is sign(R), clipped to RMS 1."""
    R = randn(4, 1).abs() @ randn(1, 9).abs() * randn(4, 9).sign()
    h = Matrix(randn(2, 2), beta1=0.0, beta2=0.0)
    N, c = moments().update(R, h)
    assert c == 1.0
    if moments is Adafactor:
        same(N, R.sign(), 1e-6)


def test_a_rotation_within_rows_carries_factored_rows():
    """An orthogonal C leaves the total of the row statistics; a permutation permutes them."""
    for moments in (Adafactor(), CAME()):
        h = Matrix(randn(2, 2))
        moments.update(randn(3, 8), h)
        before = moments.v.row
        Q = torch.linalg.qr(randn(3, 3))[0]
        same(moments.v.rotated(Q).row.sum(), before.sum())
        same(moments.v.rotated(torch.eye(3).double()[[2, 0, 1]]).row, before[[2, 0, 1]])


def test_adam_mini_with_blocks_of_one_entry_is_adam():
    """One row per column block, one column per row block: n = 1 or r = 1."""
    for shape, by in (((1, 8), "column"), ((1, 8), 1), ((8, 1), "row")):
        gradients = [randn(*shape, seed=s) for s in range(6)]
        for form in ("galore", "released"):
            options = {"rank": 1, "gap": 100, "transposed": False, "form": form, **SETTING}
            identity = {"choose": lambda G, r, old: torch.eye(G.shape[0], r, dtype=torch.float64)}
            if by == "row":
                identity["rank"] = 8
                options["rank"] = 8
            W = randn(*shape)
            adam = LowRank(W, **{**options, **identity})
            mini = LowRank(W, moments=AdamMini(by, outside=True), **{**options, **identity})
            same(finish(adam, gradients), finish(mini, gradients))


def test_adam_mini_carries_one_number_per_row_by_the_squares_and_one_per_column_as_it_is():
    h, Q = Matrix(randn(2, 2)), torch.linalg.qr(randn(3, 3))[0]
    for by in ("row", "column", 4):
        moments = AdamMini(by)
        moments.update(randn(3, 8), h)
        M, V = moments.M, moments.V
        moments.transport("rotate", Q, h)
        same(moments.M, Q @ M)
        same(moments.V, Q**2 @ V if by == "row" else V)


def test_heads_of_one_column_are_columns_and_one_head_is_one_number():
    R, h = randn(3, 8), Matrix(randn(2, 2))
    same(AdamMini("column").update(R, h)[0], AdamMini(1).update(R, h)[0])
    one = AdamMini(8)
    one.update(R, h)
    assert float(one.V.std()) < ROUNDING
    assert float(one.V[0, 0]) == pytest.approx(float((1 - h.beta2) * (R * R).mean()))


# ---- Natural GaLore -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [1, 3, 7])
def test_the_dense_solve_is_woodburys(held):
    """l F^-1 g = g - H z / l with (I + H^T H / l) z = H^T g."""
    moments, h = NaturalAdam(5, 0.3), Matrix(randn(2, 2))
    for i in range(held):
        R = randn(3, 8, seed=i)
        moments.update(R, h)
    H, g = torch.stack([X.flatten() for X in moments.H], dim=1), R.flatten()
    assert H.shape[1] == min(held, 5)
    damping = 0.3 * (H.T @ H).trace() / H.shape[1]
    z = torch.linalg.solve(torch.eye(H.shape[1]) + H.T @ H / damping, H.T @ g)
    same(moments.natural(R).flatten(), g - H @ z / damping)


def test_relative_damping_does_not_see_the_size_of_the_gradients_and_absolute_damping_does():
    def run(size, **options):
        moments = NaturalAdam(4, 0.5, **options)
        return finish(LowRank(W, rank=3, gap=4, moments=moments, eps=0.0), [size * G for G in stream(TALL)])

    W = randn(*TALL)
    same(run(1.0), run(1000.0))
    assert (run(1.0, absolute=True) - run(1000.0, absolute=True)).norm() > 1e-3


def test_a_small_first_gradient_does_not_set_the_units_of_all_that_come():
    """As before a head of zeros. The step would be in units of 1 / |g|, and stay small until V has forgotten them."""
    ends = []
    for size in (1.0, 1e-4):
        first, *others = stream(TALL)
        ends.append(finish(LowRank(randn(*TALL), rank=3, moments=NaturalAdam(4, 0.5)), [size * first, *others]))
    small, large = (end - randn(*TALL) for end in ends)
    assert (small - large).norm() < 0.5 * large.norm()


def test_a_window_of_one_is_adam():
    """F = l I + g g^T maps g to a multiple of itself, the same one at every step with relative damping and |g| = 1."""
    W, gradients = randn(*WIDE), [G / G.norm() for G in stream(WIDE)]
    options = {"rank": 6, "gap": 100, "eps": 0.0}
    natural = LowRank(W, moments=NaturalAdam(1, 0.5), **options)
    same(finish(natural, gradients), finish(LowRank(W, **options), gradients))


@pytest.mark.parametrize("on_window, held", [("rotate", 4), ("clear", 1)])
def test_the_window_is_turned_into_the_new_basis_or_emptied(on_window, held):
    ref = LowRank(randn(*WIDE), rank=6, gap=5, moments=NaturalAdam(4, 0.5, on_window=on_window))
    gradients = stream(WIDE)
    finish(ref, gradients[:6])  # bases at 0 and 5; at full rank P^T turns everything
    assert len(ref.moments.H) == held
    for X, G in zip(ref.moments.H, reversed(gradients[:6]), strict=False):
        same(X, ref.P.T @ G)


# ---- FLora ----------------------------------------------------------------------------------------------------------


def test_with_an_orthogonal_sketch_of_full_rank_nothing_is_lost():
    """A^T A = I: FLora is then Adafactor with a first moment of the whole matrix, at every refresh too."""
    Q = [torch.linalg.qr(randn(6, 6, seed=s))[0] for s in range(4)]
    W, gradients = randn(*WIDE), stream(WIDE)
    flora = FLora(W, gap=4, sketch=lambda k: Q[k])
    identity = {"rank": 6, "gap": 100, "choose": lambda G, r, old: torch.eye(6, dtype=torch.float64)}
    same(finish(flora, gradients), finish(LowRank(W, moments=Adafactor(late=True), **identity), gradients))


def test_a_momentum_is_read_through_the_sketch_it_was_made_with_and_then_carried_over():
    A = [randn(2, 6, seed=s) for s in range(2)]
    ref = FLora(randn(*WIDE), gap=3, sketch=lambda k: A[k])
    gradients = stream(WIDE)
    finish(ref, gradients[:2])
    M, W = ref.M, ref.weight
    ref.step(gradients[2])  # the third update
    u = gradients[2] / (ref.v.row * ref.v.column / ref.v.row.mean()).sqrt()
    U = 0.1 * u + 0.9 * A[0].T @ M
    same(W - ref.weight, 1e-3 * U / max(1.0, float(U.norm()) / 66**0.5))
    same(ref.M, A[1] @ (0.9 * A[0].T @ M + 0.1 * u))
