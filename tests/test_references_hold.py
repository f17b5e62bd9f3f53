"""What the references of subspaces must satisfy by themselves, without the package. float64 throughout."""

from __future__ import annotations

import pytest
import torch
from references.base import Adam, LowRank, dominant, sampled
from references.factored import CAME, Adafactor, AdamMini
from references.momentum import Momentum
from references.quantized import QGaLore, intervals
from references.rows import largest, rows, weights
from references.streams import SQUARE, TALL, WIDE, finish, randn, same, stream
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
