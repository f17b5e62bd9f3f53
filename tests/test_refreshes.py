"""Bases after a refresh, whatever the rule, and when refreshes come."""

from __future__ import annotations

import pytest
import torch
from streams import (
    PLAIN,
    SQUARE,
    STACK,
    TALL,
    WIDE,
    displacement,
    finish,
    gradients,
    names_covering,
    optimizer,
    run,
    weight,
    wide,
)

from hf_lowrank import LowRankOptimizer
from hf_lowrank.methods import resolve
from hf_lowrank.tensors import kernels


GAP = 5
WITH_BASIS = [n for n in names_covering(("subspace",)) if "basis" in resolve.parts(n, {}).subspace.slots()]


def accepts(name, key, value):
    try:
        resolve.complete(name, {"rank": 3, key: value})
    except ValueError:
        return False
    return True


ORTHONORMAL = [n for n in WITH_BASIS if resolve.parts(n, {}).subspace.orthonormal]
REFRESHES = [
    (n, how) for n in ORTHONORMAL for how in ("gram", "svd", "randomized", "power") if accepts(n, "refresh", how)
] + [(n, None) for n in ORTHONORMAL if not accepts(n, "refresh", "gram")]
HAVE_BOTH = [n for n in ORTHONORMAL if (n, "gram") in REFRESHES and (n, "svd") in REFRESHES]
INEXACT = [(n, how) for n, how in REFRESHES if how in ("randomized", "power")]


def refresh_option(how):
    return {} if how is None else {"refresh": how}


# ---- bases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, how", REFRESHES)
@pytest.mark.parametrize("shape, rank", [(WIDE, 3), (TALL, 6), (STACK, 2), ((1, 4), 2)])
def test_bases_are_orthonormal_after_every_refresh(name, how, shape, rank):
    p = weight(shape)
    opt = optimizer(p, name, rank=rank, update_proj_gap=2, **refresh_option(how))
    for _ in run(opt, p, gradients(shape, 7)):
        P = opt.state[p]["basis"]
        # Householder QR and LAPACK's eigenvectors are orthonormal to some units of 2^-24
        assert (P.mT @ P - torch.eye(P.shape[-1])).abs().max() < 1e-5
    assert int(opt.state[p]["refreshes"]) == 4


@pytest.mark.parametrize("name, how", REFRESHES)
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("kind", ["one singular vector", "one entry", "tiny", "huge"])
def test_bases_are_orthonormal_for_degenerate_gradients_too(name, how, proj_type, kind):
    G = gradients(WIDE, 1)[0]
    G = {
        "one singular vector": torch.ones(WIDE),
        "one entry": torch.zeros(WIDE).index_put((torch.tensor(2), torch.tensor(3)), torch.tensor(1.0)),
        "tiny": G * 1e-17,  # squares of 1e-34 are just above fp32's smallest normal numbers
        "huge": G * 1e15,
    }[kind]
    p = weight(WIDE)
    opt = optimizer(p, name, rank=4, update_proj_gap=1, proj_type=proj_type, **refresh_option(how))
    for _ in run(opt, p, [G, G, G]):
        P = opt.state[p]["basis"]
        assert (P.mT @ P - torch.eye(4)).abs().max() < 1e-5
        assert torch.isfinite(p).all()
    assert int(opt.state[p]["refreshes"]) == 3


@pytest.mark.parametrize("name", HAVE_BOTH)
@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE, STACK])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_runs_with_svd_and_gram_refreshes_agree(name, shape, proj_type):
    got = []
    for how in ("svd", "gram"):
        p = weight(shape)
        opt = optimizer(p, name, update_proj_gap=GAP, refresh=how, proj_type=proj_type)
        got.append(finish(opt, p, gradients(shape, 21)))
    assert displacement(*got, weight(shape)) < 1e-3  # the contract; seen 2e-6


@pytest.mark.parametrize("name, how", INEXACT)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_an_inexact_refresh_captures_the_energy_of_the_exact_one(name, how, shape):
    stream, r, p = gradients(shape, 21, drift=0.02, decay=0.8), 6, weight(shape)
    opt = optimizer(p, name, rank=r, update_proj_gap=GAP, refresh=how)
    for t in run(opt, p, stream):
        if t % GAP == 0:
            G = wide(stream[t]).double()
            best = torch.linalg.svdvals(G)[:r].square().sum()
            assert (opt.state[p]["basis"].double().T @ G).square().sum() >= 0.99 * best


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (2, 6, 11)])
def test_where_squares_overflow_in_fp32_the_vectors_come_from_float64(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    (U, sigma), (far, large) = kernels.gram_basis(G), kernels.gram_basis(G * 2.0**66)
    assert not torch.isfinite((G * 2.0**66).square().sum())
    # fp32 loses the square of the condition number, here below 1e2: 1e-7 x 1e4
    torch.testing.assert_close(large * 2.0**-66, sigma, rtol=1e-4, atol=0)
    torch.testing.assert_close((U.mT @ far).abs(), torch.eye(6).expand(*shape[:-2], 6, 6), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", PLAIN)
def test_the_report_of_a_refresh_is_overlap_captured_energy_and_stable_rank(name):
    stream, p = gradients(WIDE, 11), weight(WIDE)
    opt = optimizer(p, name, update_proj_gap=GAP)
    old = None
    for t in run(opt, p, stream):
        if t % GAP:
            continue
        G, P, report = stream[t], opt.state[p]["basis"].clone(), opt.state[p]["report"].tolist()
        energy = (P.T @ G).square().sum() / G.square().sum()
        assert report[1] == pytest.approx(float(energy), rel=1e-4)
        if old is not None:  # I3S eq. 3
            assert report[0] == pytest.approx(float((P.T @ old).square().sum() / 3), rel=1e-4)
        stable_rank = float(G.square().sum() / torch.linalg.matrix_norm(G, 2) ** 2)
        assert report[2] in (-1.0, pytest.approx(stable_rank, rel=1e-4))  # -1: the rule knows no spectrum
        old = P


# ---- the schedule of refreshes --------------------------------------------------------------------------------------


def refresh_times(opt, ps, steps):
    times = [[] for _ in ps]
    seen = [0] * len(ps)
    for t in range(steps):
        for p in ps:
            p.grad = gradients(tuple(p.shape), 1, seed=t)[0]
        opt.step()
        for i, p in enumerate(ps):
            if (count := int(opt.state[p]["refreshes"])) > seen[i]:
                assert count == seen[i] + 1
                seen[i] = count
                times[i].append(t)
    return times


@pytest.mark.parametrize("name", PLAIN)
def test_without_stagger_every_matrix_refreshes_at_multiples_of_the_gap(name):
    ps = [weight(WIDE), weight(TALL), weight(STACK)]
    assert refresh_times(optimizer(ps, name, update_proj_gap=4), ps, 10) == [[0, 4, 8]] * 3


def test_matrices_of_many_groups_are_spread_as_those_of_one():
    """As layer-wise rates make them: a group each."""
    gap, times = 6, []
    for apart in (False, True):
        ps = [weight((6, 11), seed=i) for i in range(gap)]
        given = {"rank": 3, "update_proj_gap": gap, "stagger": True}
        sets = [[p] for p in ps] if apart else [ps]
        opt = LowRankOptimizer([{"params": some, **given} for some in sets], "galore_dominant_adamw")
        times.append(refresh_times(opt, ps, 2 * gap + 1))
    assert times[0] == times[1] and len({tuple(one) for one in times[0]}) == gap


def test_stagger_spreads_the_refreshes_over_the_interval_by_cost():
    gap = 8
    shapes = [(4, 8)] * 6 + [(8, 16)] + [(4, 8)] * 2  # costs 128 and 1024: short^2 x long
    ps = [weight(shape) for shape in shapes]
    times = refresh_times(optimizer(ps, "galore_dominant_adamw", update_proj_gap=gap, stagger=True), ps, 3 * gap + 1)
    cost = [min(s) ** 2 * max(s) for s in shapes]
    total, done = sum(cost), 0
    for c, own in zip(cost, times, strict=True):
        done += c
        assert own[0] == 0
        assert {b - a for a, b in zip(own[1:], own[2:], strict=False)} == {gap}  # then each keeps its interval
        assert 1 <= own[1] <= gap
        # the share of the interval gone is the share of the work done, to one step
        assert abs(own[1] / gap - done / total) <= 1 / gap
    evenly = [weight((4, 8)) for _ in range(8)]
    times = refresh_times(
        optimizer(evenly, "galore_dominant_adamw", update_proj_gap=gap, stagger=True), evenly, gap + 1
    )
    assert [own[1] for own in times] == list(range(1, 9))


def test_a_closure_is_evaluated_with_gradients_enabled():
    p = weight(WIDE)
    opt = optimizer(p, "galore_i3s_adamw")

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return float(loss.detach())

    losses = [opt.step(closure) for _ in range(20)]
    assert losses[-1] < losses[0]
