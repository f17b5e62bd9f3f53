"""Gradients of zeros, of experts without tokens, and projections that are rounding noise."""

from __future__ import annotations

import pytest
import torch
from fitting import fitting
from streams import (
    COVERING,
    PLAIN,
    STACK,
    TALL,
    WIDE,
    displacement,
    finish,
    gradients,
    optimizer,
    run,
    weight,
)

from hf_lowrank import METHODS


GAP = 4


def train(name, shape, rank, stream, *, dtype=torch.float32, **options):
    p = weight(shape, dtype=dtype)
    if rank:
        options = {"update_proj_gap": GAP, **options}
    opt = optimizer(p, name, rank=rank, weight_decay=0.1, **options)
    finish(opt, p, stream)
    return p, opt


# ---- zero -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape, rank", [(WIDE, 3), (TALL, 3), (STACK, 2)])
def test_with_no_basis_yet_a_zero_gradient_gives_the_first_axes(name, shape, rank):
    p = weight(shape)
    start = p.detach().clone()
    opt = optimizer(p, name, rank=rank, lr=1e-2, weight_decay=0.1)
    finish(opt, p, [torch.zeros(shape)] * 3)
    P = opt.state[p]["basis"]
    assert torch.equal(P, torch.eye(*P.shape[-2:]).expand_as(P))
    assert int(opt.state[p]["refreshes"]) == 0
    assert int(opt.state[p]["step"]) == 3
    # decoupled decay of 1e-3 a step goes on, in fp32
    torch.testing.assert_close(p.detach(), start * 0.999**3, rtol=1e-6, atol=0)
    [G] = gradients(shape, 1)
    finish(opt, p, [G])  # still due: the first live gradient is the first refresh
    assert int(opt.state[p]["refreshes"]) == 1


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape, rank", [(WIDE, 3), (TALL, 3), (STACK, 2)])
def test_a_zero_gradient_at_a_refresh_keeps_the_basis_and_the_refresh_stays_due(name, shape, rank):
    good, zero = gradients(shape, 12), torch.zeros(shape)
    p = weight(shape)
    opt = optimizer(p, name, rank=rank, update_proj_gap=GAP)
    finish(opt, p, good[:GAP])
    before = opt.state[p]["basis"].clone()
    V = opt.state[p]["exp_avg_sq"].clone()
    finish(opt, p, [zero, zero])
    assert torch.equal(opt.state[p]["basis"], before)
    assert int(opt.state[p]["refreshes"]) == 1
    # moments go on as AdamW's do, weights move on with the momentum
    torch.testing.assert_close(opt.state[p]["exp_avg_sq"], V * 0.999**2, rtol=1e-6, atol=0)
    finish(opt, p, good[GAP : GAP + 1])
    assert int(opt.state[p]["refreshes"]) == 2
    assert not torch.equal(opt.state[p]["basis"], before)
    seen = [int(opt.state[p]["refreshes"]) for _ in run(opt, p, good[GAP + 1 : 2 * GAP])]
    assert seen == [2, 3, 3]  # steps 7, 8, 9: the schedule itself did not move


@pytest.mark.parametrize("name", PLAIN)
def test_a_zero_gradient_moves_weights_as_adamw_does(name):
    """In a basis of axes at full rank the run is AdamW's, zeros in the middle included."""
    stream = gradients(WIDE, 9)
    stream[3] = stream[4] = torch.zeros(WIDE)
    p, q, settings = weight(WIDE), weight(WIDE), {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}
    opt = optimizer(p, name, rank=6, scale=1.0, update_proj_gap=1, **settings)
    opt.step()
    opt.state[p]["refresh_at"].fill_(10**9)
    finish(opt, p, stream)
    adamw = torch.optim.AdamW([q], **settings)
    finish(adamw, q, stream)
    assert displacement(q, p, weight(WIDE)) < 1e-6  # fp32 in another order


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("on_refresh", ["keep", "rotate", "rotate_variance_complete"])
def test_an_expert_without_tokens_keeps_its_basis_while_the_others_refresh(name, on_refresh):
    stream, p = gradients(STACK, 9), weight(STACK)
    stream[4][1] = 0  # the second refresh finds nothing in slice 1
    opt = optimizer(p, name, rank=2, update_proj_gap=GAP, on_refresh=on_refresh)
    finish(opt, p, stream[:4])
    before, moments = opt.state[p]["basis"].clone(), opt.state[p]["exp_avg"].clone()
    finish(opt, p, stream[4:5])
    changed = [not torch.equal(a, b) for a, b in zip(opt.state[p]["basis"], before, strict=True)]
    assert changed == [True, False, True]
    assert int(opt.state[p]["refreshes"]) == 2
    # its change of basis is the identity to 1e-6, so its momentum only fades: b1 = 0.9
    torch.testing.assert_close(opt.state[p]["exp_avg"][1], 0.9 * moments[1], rtol=1e-4, atol=1e-6)
    finish(opt, p, stream[5:])
    assert not torch.equal(opt.state[p]["basis"][1], before[1])  # it had tokens at the third refresh


@pytest.mark.parametrize("name", PLAIN)
def test_an_expert_that_is_idle_from_the_start_has_axes_and_wakes_up(name):
    stream, p = gradients(STACK, 9), weight(STACK)
    for G in stream[:4]:
        G[1] = 0
    opt = optimizer(p, name, rank=2, update_proj_gap=GAP)
    start = p.detach().clone()
    finish(opt, p, stream[:4])
    assert torch.equal(opt.state[p]["basis"][1], torch.eye(5, 2))
    assert torch.equal(p[1], start[1])
    finish(opt, p, stream[4:])
    step = (p - start).norm(dim=(1, 2))
    assert step[1] > 0.1 * step[0]  # five live steps against nine


@pytest.mark.parametrize("shape, rank, basis_format", [(STACK, 2, "fp32"), ((2, 70, 80), 60, "8bit")])
@pytest.mark.parametrize("name", ["grasswalk_adamw", "subtrack_pp_adamw", "ldadam", "online_subspace_adamw"])
def test_an_expert_that_wakes_up_late_begins_as_the_others_did(name, shape, rank, basis_format):
    """Rules that follow a basis have nothing to follow there: it gets the leading vectors of its first gradient."""
    stream, p = gradients(shape, 6), weight(shape)
    for G in stream[:5]:
        G[1] = 0
    opt = optimizer(p, name, **fitting(name, {"rank": rank, "update_proj_gap": 5, "basis_format": basis_format}))
    finish(opt, p, stream)
    plan, G = opt.plan(p), stream[5][1]
    P = plan.encodings["basis"].decode(opt.state[p], "basis", plan.buffers["basis"])[1]
    leading = torch.linalg.svdvals(G.double())[:rank].square().sum()
    # all that a basis of this rank can take of it, but for 8 bits' rounding; the first axes take rank / m of it
    assert (P.mT @ G).square().sum() > (0.99 if basis_format == "8bit" else 1 - 1e-5) * leading


@pytest.mark.parametrize("steps_of_zeros", [1, 2, 3])
def test_the_basis_of_online_subspace_descent_never_steps_along_its_own_first_gradient(steps_of_zeros):
    """There f is stationary, and Adam makes a step of full size of the rounding noise."""
    ends = []
    for zeros in (0, steps_of_zeros):
        p = weight(WIDE)
        opt = optimizer(p, "online_subspace_adamw", rank=2)
        finish(opt, p, [torch.zeros(WIDE)] * zeros + gradients(WIDE, 1))
        ends.append((int(opt.state[p]["refreshes"]), opt.state[p]["basis"].clone()))
    assert ends[0][0] == ends[1][0] == 1 and torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("name", [n for n in COVERING if METHODS[n].subspace == "dominant"])
def test_a_power_step_that_finds_nothing_leaves_everything_finite(name):
    """The new gradient is orthogonal to the old basis: G^T P = 0, and a power step from there sees none of it."""
    first, second = torch.zeros(WIDE), torch.zeros(WIDE)
    first[0, 0], second[4, 3] = 1.0, 1.0
    p, opt = train(name, WIDE, 1, [first, second, second], refresh="power", update_proj_gap=1)
    assert torch.isfinite(p).all()
    for key, value in opt.state[p].items():
        assert torch.isfinite(value).all(), key


@pytest.mark.parametrize("form", ["released", "i3s", "paper"])
@pytest.mark.parametrize("subspace", ["uniform", "hybrid", "i3s", "random", "dominant"])
def test_a_projection_that_is_rounding_noise_does_not_scale_the_residual(subspace, form):
    """Of a gradient of rank one a uniform draw may pick null vectors only: R is 1e-8 G, ||N_j|| / ||R_j|| is 1e8.

    Adam's direction is of order 1 and lr = 1e-2: a step of more than 1 has nothing to do with either.
    """
    G = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 12.0)) / 30
    for seed in range(20):
        p = weight(WIDE)
        options = {"r0": 0} if subspace == "hybrid" else {}
        opt = optimizer(
            p, "lowrank", rank=2, subspace=subspace, reconstruction="fira", fira_form=form, seed=seed, **options
        )
        assert (finish(opt, p, [G]) - weight(WIDE)).abs().max() < 1


# ---- next to nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("correct_bias", [True, False])
def test_moments_of_an_expert_that_sees_no_token_any_more_fade_away_and_harm_nothing(name, correct_bias):
    """0.5^160 has left the range of fp32, and 0.5^75 that of its squares."""
    stream = gradients(STACK, 4)
    idle = stream[3].clone()
    idle[0] = 0
    p, opt = train(name, STACK, 2, [*stream, *[idle] * 160, *stream], betas=(0.5, 0.5), correct_bias=correct_bias)
    assert p.isfinite().all()
    assert all(value.isfinite().all() for value in opt.state[p].values())


@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-30, 1e-25, 1e-22, 1e-19])
@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("shape, rank", [(WIDE, 3), (TALL, 3), (STACK, 2), ((9, 1), 1), ((9,), None)])
def test_gradients_at_the_end_of_the_range_of_fp32_leave_everything_finite(name, shape, rank, size):
    stream = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) * size for i in range(6)]
    p, opt = train(name, shape, rank, stream)
    assert p.isfinite().all()
    assert all(value.isfinite().all() for value in opt.state[p].values())


@pytest.mark.parametrize("size", [1e-18, 3e-23, 1e-25, 1e-30])
def test_stable_spam_takes_a_gradient_whose_squares_underflow_as_it_is(size):
    """Divided by a norm of 0 it would be 1e37 times as large, and the second moment would remember it for good."""
    shape, stream = (8, 16), gradients((8, 16), 20)
    stream[10] = stream[10] / stream[10].abs().max() * size
    p = weight(shape)
    opt = optimizer(p, "galore_dominant_adamw", rank=4, stable_spam=True)
    finish(opt, p, stream)
    largest = max(float(G.square().sum()) for G in stream)
    assert float(opt.state[p]["exp_avg_sq"].max()) < largest
