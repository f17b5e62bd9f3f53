"""What the references of references/ must satisfy by themselves, without the package. float64 throughout."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from references.base import Adam, LowRank, Matrix, dominant, sampled
from references.compressed import FOAM, GWT, fold, haar, inverse_haar, unfold
from references.factored import CAME, Adafactor, AdamMini
from references.golore import GoLore, uniform_stiefel
from references.ldadam import BlockPower, ErrorFeedback, LDAdam
from references.momentum import Momentum
from references.natural import NaturalAdam
from references.online import OnlineSubspace, error_gradient
from references.quantized import QGaLore, intervals
from references.rows import largest, rows, weights
from references.scaled import Apollo
from references.sketch import FLora
from references.streams import ROUNDING, SHAPES, SQUARE, TALL, WIDE, finish, randn, same, stream
from references.subtrack import SubTrack, geodesic
from references.twosided import TwoSided


SETTING = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95}


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_options_are_shared_by_no_two_references():
    W, gradients = randn(*WIDE), stream(WIDE)
    for moments in (Adam(), Adafactor(), CAME(), AdamMini(), Momentum()):
        first = finish(LowRank(W, rank=3, gap=4, moments=moments, on_refresh="rotate"), gradients)
        same(first, finish(LowRank(W, rank=3, gap=4, moments=moments, on_refresh="rotate"), gradients))


@pytest.mark.parametrize("moments", [Adafactor(), CAME(), AdamMini("row"), AdamMini("column")])
def test_without_an_outside_bias_correction_the_forms_of_fira_meet_at_scale_one(moments):
    W, gradients = randn(*TALL), stream(TALL)
    options = {"rank": 3, "gap": 4, "moments": moments, "on_refresh": "rotate", "scale": 1.0, "eps": 1e-8}
    one, two, three = (finish(LowRank(W, form=form, **options), gradients) for form in ("released", "i3s", "paper"))
    same(one, two)
    same(two, three)


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


# ---- GoLore, momentum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", [Adam(), Momentum()])
def test_golore_is_galore_before_the_switch_and_carries_its_momentum_at_every_refresh(moments):
    draws = []

    def draw(m, r):
        draws.append(uniform_stiefel(randn(m, r, seed=len(draws))))
        return draws[-1]

    W, gradients = randn(*TALL), stream(TALL)
    early = GoLore(W, rank=3, gap=4, switch=5, draw=draw, moments=moments)
    plain = LowRank(W, rank=3, gap=4, on_refresh="rotate", moments=moments, scale=0.25)
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


# ---- Grass ----------------------------------------------------------------------------------------------------------


def test_rows_drawn_with_replacement_are_unbiased_and_norms_have_the_least_variance():
    """Exact expectations over all draws of one row: E[P P^T] = I; the error of P P^T G is least for q = ||G_j||."""
    G = stream(WIDE)[0] * torch.tensor([3.0, 1, 1, 2, 0.5, 1])[:, None]
    norms = G.norm(dim=1)
    errors = {}
    for name, size in {"norm": norms, "squared": norms**2, "uniform": torch.ones(6).double()}.items():
        q = size / size.sum()
        mean, errors[name] = 0.0, 0.0
        for j in range(6):
            index = torch.tensor([j])
            P = rows(lambda G, r, index=index, q=q: (index, weights(q, index)))(G, 1, None)
            mean = mean + q[j] * P @ P.T
            errors[name] += float(q[j] * (P @ P.T @ G - G).norm() ** 2)
        same(mean, torch.eye(6, dtype=torch.float64))
    assert errors["norm"] < min(errors["squared"], errors["uniform"])


def test_a_row_drawn_twice_moves_twice():
    draw = (torch.tensor([2, 2, 4]), torch.tensor([0.5, 0.5, 2.0]))
    W, G = randn(*WIDE), stream(WIDE)[0]
    ref = LowRank(W, rank=3, gap=10, choose=rows(lambda G, r: draw), moments=Momentum(), beta1=0.0, lr=0.1)
    ref.step(G)
    expected = W.clone()
    expected[2] -= 0.1 * 2 * 0.5**2 * G[2]
    expected[4] -= 0.1 * 2.0**2 * G[4]
    same(ref.weight, expected)


def test_the_largest_rows_leave_the_least():
    G = stream(WIDE)[0]
    P = rows(largest)(G, 2, None)
    pairs = [torch.eye(6, dtype=torch.float64)[:, [i, j]] for i in range(6) for j in range(i)]
    left = [float((G - Q @ Q.T @ G).norm()) for Q in pairs]
    assert float((G - P @ P.T @ G).norm()) == pytest.approx(min(left))


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
    """F^-1 g = g / l - H z / l^2 with (I + H^T H / l) z = H^T g."""
    moments, h = NaturalAdam(5, 0.3), Matrix(randn(2, 2))
    for i in range(held):
        R = randn(3, 8, seed=i)
        moments.update(R, h)
    H, g = torch.stack([X.flatten() for X in moments.H], dim=1), R.flatten()
    assert H.shape[1] == min(held, 5)
    damping = 0.3 * (H.T @ H).trace() / H.shape[1]
    z = torch.linalg.solve(torch.eye(H.shape[1]) + H.T @ H / damping, H.T @ g)
    same(moments.natural(R).flatten(), g / damping - H @ z / damping**2)


def test_relative_damping_does_not_see_the_size_of_the_gradients_and_absolute_damping_does():
    def run(size, **options):
        moments = NaturalAdam(4, 0.5, **options)
        return finish(LowRank(W, rank=3, gap=4, moments=moments, eps=0.0), [size * G for G in stream(TALL)])

    W = randn(*TALL)
    same(run(1.0), run(1000.0))
    assert (run(1.0, absolute=True) - run(1000.0, absolute=True)).norm() > 1e-3


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


# ---- Q-GaLore -------------------------------------------------------------------------------------------------------


def test_the_interval_doubles_after_five_calm_refreshes_up_to_a_cap():
    assert intervals([0.9] * 4, 10) == [10] * 4
    assert intervals([0.9] * 5, 10) == [10] * 4 + [20]
    assert intervals([0.9] * 30, 10) == [10] * 4 + [20] * 5 + [40] * 5 + [80] * 5 + [160] * 11
    assert intervals([0.5, 0.3, 0.5, 0.4, 0.4], 10)[-1] == 20  # the mean counts, and 0.42 >= 0.4
    assert intervals([0.4, 0.3, 0.4, 0.4, 0.4], 10)[-1] == 10  # 0.38


def test_the_interval_comes_back_when_the_subspace_moves():
    assert intervals([0.9] * 10 + [0.1, 0.1, 0.1], 10)[9:] == [40, 20, 10, 10]
    assert intervals([0.9] * 5 + [0.1] + [0.9] * 5, 10)[4:] == [20, 10, 10, 10, 10, 10, 20]  # the count begins anew
    assert intervals([0.9] * 4 + [0.39], 10)[-1] == 10  # a low overlap never doubles


def test_a_basis_that_stands_still_is_refreshed_ever_more_rarely():
    ref = QGaLore(randn(*WIDE), rank=3, gap=1, store=lambda P: P)
    due = []
    for t in range(40):
        due += [t] if t == ref.due else []
        ref.step(stream(WIDE, 1)[0])
    assert due == [0, 1, 2, 3, 4, 5, 7, 9, 11, 13, 15, 19, 23, 27, 31, 35]
    same(torch.tensor(ref.overlaps), torch.ones(len(due) - 1), 1e-6)


def test_what_is_projected_with_is_the_stored_basis():
    coarse = lambda P: (P * 4).round() / 4  # noqa: E731
    W, G = randn(*WIDE), stream(WIDE)[0]
    ref = QGaLore(W, rank=3, gap=5, store=coarse, moments=Momentum(), beta1=0.0, lr=1.0, scale=1.0)
    ref.step(G)
    P = coarse(dominant(G, 3, None))
    same(ref.weight, W - P @ P.T @ G)


# ---- FLora ----------------------------------------------------------------------------------------------------------


def test_with_an_orthogonal_sketch_of_full_rank_nothing_is_lost():
    """A^T A = I: FLora is then Adafactor with a first moment of the whole matrix, at every refresh too."""
    Q = [torch.linalg.qr(randn(6, 6, seed=s))[0] for s in range(4)]
    W, gradients = randn(*WIDE), stream(WIDE)
    flora = FLora(W, gap=4, sketch=lambda k: Q[k])
    dense = LowRank(W, rank=6, gap=100, choose=lambda G, r, old: torch.eye(6, dtype=torch.float64), moments=_Late())
    same(finish(flora, gradients), finish(dense, gradients))


class _Late(Adafactor):
    """Adafactor that limits the update after the momentum, not before: FLora's order."""

    def update(self, R, h):
        self.t += 1
        u = R / self.v.update(R * R + 1e-30, 1 - self.t**-0.8).sqrt()
        self.M = h.beta1 * self.M + (1 - h.beta1) * u
        return self.M / max(1.0, float(self.M.norm()) / self.M.numel() ** 0.5), 1.0


@pytest.mark.parametrize("late", [False, True])
def test_the_momentum_is_read_through_the_new_sketch_or_late_through_the_one_it_was_made_with(late):
    A = [randn(2, 6, seed=s) for s in range(2)]
    ref = FLora(randn(*WIDE), gap=3, sketch=lambda k: A[k], late=late)
    gradients = stream(WIDE)
    finish(ref, gradients[:3])
    M, W = ref.M, ref.weight
    ref.step(gradients[3])  # the refresh
    u = gradients[3] / (ref.v.row * ref.v.column / ref.v.row.mean()).sqrt()
    U = 0.1 * u + 0.9 * (A[0].T if late else A[1].T @ A[1] @ A[0].T) @ M
    same(W - ref.weight, 1e-3 * U / max(1.0, float(U.norm()) / 66**0.5))
    same(ref.M, 0.9 * A[1] @ A[0].T @ M + 0.1 * A[1] @ u)


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


# ---- GWT, FOAM ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_haar_transform_is_orthogonal(level):
    X = torch.eye(16, dtype=torch.float64)
    A, parts = X, []
    for _ in range(level):
        A, D = haar(A)
        parts.insert(0, D)
    H = torch.cat([A, *parts], dim=1)
    same(H.T @ H, torch.eye(16, dtype=torch.float64))
    for D in parts:
        A = inverse_haar(A, D)
    same(A, X)


def test_at_level_zero_both_are_adam():
    W, gradients = randn(*SQUARE), stream(SQUARE)
    identity = {"choose": lambda G, r, old: torch.eye(7, dtype=torch.float64), "transposed": False}
    options = {"scale": 0.5, **SETTING}
    adam = finish(LowRank(W, rank=7, **identity, **options), gradients)
    same(finish(FOAM(W, level=0, **options), gradients), adam)
    same(finish(FOAM(W, level=0, square_of_mean=True, **options), gradients), adam)
    gwt = GWT(W, level=0, **options)
    gwt.limit = lambda N, **_: N
    same(finish(gwt, gradients), adam)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_gwt_without_its_limiter_is_foams_numerator_over_one_denominator_per_block(level):
    """All coefficients of a block share sqrt(V): U = (G - mean + EMA of the mean) / sqrt(V), V of A = 2^(l/2) mean."""
    W, gradients = randn(3, 16), [randn(3, 16, seed=s) for s in range(6)]
    ref = GWT(W, level=level, scale=1.0, lr=1.0, beta2=0.9, eps=0.0, correct_bias=False)
    ref.limit = lambda N, **_: N
    M = V = 0.0
    for G in gradients:
        before, mean = ref.weight, fold(G, level)
        ref.step(G)
        M, V = 0.9 * M + 0.1 * mean, 0.9 * V + 0.1 * 2**level * mean**2
        same(before - ref.weight, (G - unfold(mean, level) + unfold(M, level)) / unfold(V.sqrt(), level))


def test_the_limiter_of_gwt_holds_back_approximation_and_details_alike():
    W, G = randn(3, 8), randn(3, 8, seed=1)
    options = {"level": 2, "lr": 1.0, "beta1": 0.0, "beta2": 1.0, "eps": 0.0, "correct_bias": False}
    free, held = GWT(W, **options), GWT(W, **options)
    for ref in (free, held):
        ref.V = torch.ones(3, 2, dtype=torch.float64)
    free.limit = lambda N, **_: N
    finish(free, [G, 10 * G])
    finish(held, [G, 10 * G])
    same(W - free.weight, 0.25 * 11 * G)
    same(W - held.weight, 0.25 * 2.01 * G, 1e-6)  # its 1e-8


def test_foam_on_blocks_of_equal_entries_is_adam_and_the_rest_is_memoryless():
    W, gradients = randn(3, 8), [unfold(randn(3, 2, seed=s), 2) for s in range(5)]
    identity = {"rank": 3, "choose": lambda G, r, old: torch.eye(3, dtype=torch.float64), "transposed": False}
    adam = finish(LowRank(W, **identity, **SETTING), gradients)
    same(finish(FOAM(W, scale=1.0, **SETTING), gradients), adam)
    X = randn(3, 8)
    same(fold(X - unfold(fold(X, 2), 2), 2), torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("kind", [GWT, FOAM])
def test_a_filled_up_axis_is_cropped(kind):
    """11 columns and a twelfth of zeros: the same weights, the last one cut off."""
    W, gradients = randn(3, 11), [randn(3, 11, seed=s) for s in range(5)]
    wider = [torch.cat([G, torch.zeros(3, 1)], dim=1) for G in gradients]
    cut = finish(kind(torch.cat([W, torch.zeros(3, 1)], dim=1)), wider)[:, :11]
    same(finish(kind(W), gradients), cut)


# ---- two sides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["keep", "rotate", "rotate_variance", "reset"])
def test_two_sided_runs_do_not_depend_on_the_orientation(how):
    W, gradients = randn(*WIDE), stream(WIDE)
    options = {"rank": 3, "gap": 4, "on_refresh": how, **SETTING}
    wide = finish(TwoSided(W, **options), gradients)
    tall = finish(TwoSided(W.T, **options), [G.T for G in gradients])
    same(wide, tall.T)


def test_on_the_two_sided_diagonal_momentum_sgd_keeps_the_leading_singular_values():
    W, G = randn(*WIDE), stream(WIDE)[0]
    ref = TwoSided(W, rank=3, gap=10, moments=Momentum(), beta1=0.0, lr=1.0)
    ref.step(G)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    same(W - ref.weight, U[:, :3] * S[:3] @ Vh[:3])


def permuted(seed):
    """Bases of permuted axes, another permutation at every refresh."""
    drawn = iter(range(seed, seed + 100))
    return lambda G, r, old: torch.eye(len(G)).double()[:, torch.randperm(r, generator=_generator(next(drawn)))]


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def test_carried_from_permutation_to_permutation_two_sided_adam_is_adam():
    W, gradients = randn(*SQUARE), stream(SQUARE)
    two = TwoSided(
        W, rank=7, gap=1, choose=permuted(0), choose_right=permuted(200), on_refresh="rotate_variance", **SETTING
    )
    identity = {"choose": lambda G, r, old: torch.eye(7, dtype=torch.float64)}
    same(finish(two, gradients), finish(LowRank(W, rank=7, **identity, **SETTING), gradients))


def test_at_full_rank_two_sided_momentum_that_is_carried_along_is_momentum_sgd():
    W, gradients = randn(*SQUARE), stream(SQUARE)
    two = TwoSided(W, rank=7, gap=1, moments=Momentum(), on_refresh="rotate")
    identity = {"choose": lambda G, r, old: torch.eye(7, dtype=torch.float64)}
    same(finish(two, gradients), finish(LowRank(W, rank=7, moments=Momentum(), **identity), gradients))


# ---- sampling -------------------------------------------------------------------------------------------------------


def test_a_sampled_basis_is_sorted_and_its_signs_follow_the_basis_before():
    G, old = stream(WIDE)[0], torch.linalg.qr(randn(6, 3))[0]
    P = sampled(lambda S, r: torch.tensor([4, 0, 2]))(G, 3, old)
    U = torch.linalg.svd(G)[0]
    same((U.T @ P).abs().argmax(0), torch.tensor([0, 2, 4]))
    assert ((P.T @ old).diagonal() >= 0).all()
