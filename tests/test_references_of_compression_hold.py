"""What the references of GWT and FOAM must satisfy by themselves, without the package. float64 throughout."""

from __future__ import annotations

import pytest
import torch
from references.base import LowRank
from references.compressed import FOAM, GWT, fold, haar, inverse_haar, unfold
from references.streams import SQUARE, finish, randn, same, stream


SETTING = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95}


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
