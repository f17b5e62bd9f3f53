"""What must hold of every method whatever its equations are."""

from __future__ import annotations

import pytest
import torch
from fitting import fitting
from streams import (
    COVERING,
    NAMES,
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

from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.methods import registry, resolve
from hf_lowrank.tensors import kernels


GAP = 5
ADAM = [n for n in COVERING if METHODS[n].moments == "adam"]
BY_AXIS = [  # rules that tell outputs from inputs
    n for n in NAMES if METHODS[n].moments == "adam_mini" or METHODS[n].subspace in ("haar", "fold")
]
WITH_BASIS = [n for n in names_covering(("subspace",)) if "basis" in resolve.parts(n, {}).subspace.slots()]


def composable(name):
    made = resolve.parts(name, {})
    return all(getattr(made, kind).composable for kind in registry.KINDS)


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


def on_axes(p, name, **options):
    """An optimizer whose basis is the identity and stays it: state exists from the first step, gradient or not."""
    opt = optimizer(p, name, rank=p.shape[-1] + p.shape[-2], scale=1.0, **options)
    opt.step()
    state = opt.state[p]
    assert torch.equal(state["basis"], torch.eye(min(p.shape[-2:])).expand_as(state["basis"]))
    state["refresh_at"].fill_(10**9)
    return opt


# ---- AdamW ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE, STACK])
def test_with_the_identity_as_basis_and_scale_one_it_is_adamw(name, shape):
    stream = gradients(shape, 20)
    ours, theirs = weight(shape), weight(shape)
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    opt, adamw = on_axes(ours, name, **settings), torch.optim.AdamW([theirs], **settings)
    for t in run(opt, ours, stream):
        theirs.grad = stream[t]
        adamw.step()
        for group in (*opt.param_groups, *adamw.param_groups):  # a schedule, and an edit by hand
            group["lr"] *= 0.97
            group["weight_decay"] = 0.1 if t < 10 else 0.02
    # fp32 on both sides, operations in another order: seen 2e-7
    assert displacement(theirs, ours, weight(shape)) < 1e-6


@pytest.mark.parametrize("name", ADAM)
def test_dense_parameters_equal_torchs_fused_adamw_bit_for_bit(name):
    shapes = [(), (5,), WIDE, STACK]
    ours, theirs = ([weight(shape, seed=i) for i, shape in enumerate(shapes)] for _ in range(2))
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
    opt, adamw = LowRankOptimizer(ours, name, **settings), torch.optim.AdamW(theirs, fused=True, **settings)
    gen = torch.Generator().manual_seed(0)
    for t in range(12):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = b.grad = None if (t + i) % 5 == 0 else torch.randn(a.shape, generator=gen)
        opt.step()
        adamw.step()
        for group in (*opt.param_groups, *adamw.param_groups):
            group["lr"] *= 0.9
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(opt.state[a]["exp_avg"], adamw.state[b]["exp_avg"])
        assert int(opt.state[a]["step"]) == int(adamw.state[b]["step"])


@pytest.mark.parametrize("name", ADAM)
@pytest.mark.parametrize("correct_bias", [True, False])
def test_a_dense_parameter_stored_column_by_column_trains_like_any_other(name, correct_bias):
    """The fused kernel wants contiguous tensors; the formula written out must say the same."""
    got, options = [], {"rank": None, "weight_decay": 0.1, "eps": 1e-3, "correct_bias": correct_bias}
    for p in (weight(WIDE), torch.nn.Parameter(weight(WIDE).detach().T.contiguous().T)):
        got.append(finish(optimizer(p, name, **options), p, gradients(WIDE, 12)))
    assert displacement(*got, weight(WIDE)) < 1e-6  # fp32 in another order: seen 1e-7


# ---- symmetries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in COVERING if n not in BY_AXIS])
@pytest.mark.parametrize("shape", [WIDE, TALL, STACK])
def test_transposing_a_weight_transposes_the_run(name, shape):
    stream = gradients(shape, 16)
    p = weight(shape)
    q = torch.nn.Parameter(p.detach().mT.contiguous())
    a = finish(optimizer(p, name, update_proj_gap=GAP, weight_decay=0.1), p, stream)
    b = finish(optimizer(q, name, update_proj_gap=GAP, weight_decay=0.1), q, [G.mT.contiguous() for G in stream])
    # the same numbers in another memory order, so sums in another order: seen 3e-7
    assert displacement(a, b.mT, weight(shape)) < 1e-5


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("factor", [1e3, 1e-3])
def test_the_gradients_size_does_not_matter_to_adam(name, factor):
    stream, p, q = gradients(WIDE, 16), weight(WIDE), weight(WIDE)
    a = finish(optimizer(p, name, update_proj_gap=GAP, eps=1e-30), p, stream)
    b = finish(optimizer(q, name, update_proj_gap=GAP, eps=1e-30), q, [G * factor for G in stream])
    # a factor of 1000 rounds every fp32 entry; fira's 1e-8 beside column norms of 1e-3 shows as 1e-5 of its residual
    assert displacement(a, b, weight(WIDE)) < 3e-5


@pytest.mark.parametrize("name", COVERING)
def test_memory_layout_does_not_matter(name):
    stream = gradients(WIDE, 8)
    p, q = weight(WIDE), torch.nn.Parameter(weight(WIDE).detach().T.contiguous().T)  # q is stored column by column
    a = finish(optimizer(p, name, update_proj_gap=GAP), p, stream)
    b = finish(optimizer(q, name, update_proj_gap=GAP), q, [G.T.contiguous().T for G in stream])
    assert displacement(a, b, weight(WIDE)) < 1e-5


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


# ---- relations between methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", registry.TRANSPORTS)
@pytest.mark.parametrize("shape, rank", [(WIDE, 4), (TALL, 6), (STACK, 3)])
def test_hybrid_without_fixed_vectors_is_uniform_and_with_all_fixed_dominant(how, shape, rank):
    def train(name, **options):
        p = weight(shape)
        opt = optimizer(p, name, rank=rank, update_proj_gap=GAP, on_refresh=how, **options)
        return finish(opt, p, gradients(shape, 12))

    uniform, dominant = train("galore_uniform_adamw"), train("galore_dominant_adamw")
    assert torch.equal(train("galore_hybrid_adamw", r0=0), uniform)
    assert torch.equal(train("galore_hybrid_adamw", r0=rank), dominant)
    if rank < min(shape[-2:]):
        assert not torch.equal(uniform, dominant)


@pytest.mark.parametrize("name", [n for n in NAMES if not METHODS[n].free and composable(n)])
def test_the_free_form_makes_every_row_of_named_parts(name):
    row = METHODS[name]
    p, q, stream = weight(WIDE), weight(WIDE), gradients(WIDE, 12)
    chosen = {kind: getattr(row, kind) for kind in registry.KINDS}
    if not all(isinstance(part, str) for part in chosen.values()):
        pytest.skip("has a part of its own")
    a = finish(optimizer(p, name, update_proj_gap=row.defaults.get("update_proj_gap", GAP)), p, stream)
    options = fitting(name, {"rank": 3, "update_proj_gap": GAP}) | row.defaults | {"rank": 3, **chosen}
    b = finish(optimizer(q, "lowrank", **options), q, stream)
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", COVERING)
def test_a_run_repeats_bit_for_bit_and_its_seed_matters_only_to_what_is_drawn(name):
    def train(seed):
        p = weight(WIDE)
        return finish(optimizer(p, name, update_proj_gap=GAP, seed=seed), p, gradients(WIDE, 12))

    assert torch.equal(train(0), train(0))
    drawn = METHODS[name].subspace not in ("dominant",)
    if METHODS[name].subspace in ("dominant", "i3s", "uniform", "hybrid", "random"):
        assert torch.equal(train(0), train(1)) != drawn


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
