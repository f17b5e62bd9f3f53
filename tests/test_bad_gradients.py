"""Gradients that are not finite, enormous or missing; odd ranks."""

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
    finish,
    gradients,
    optimizer,
    weight,
    wide,
)

from hf_lowrank import LowRankOptimizer


GAP = 4
KINDS = [(WIDE, 3), (TALL, 3), (STACK, 2), (WIDE, None)]
NAN, INF = float("nan"), float("inf")


def train(name, shape, rank, stream, *, dtype=torch.float32, **options):
    p = weight(shape, dtype=dtype)
    if rank:
        options = {"update_proj_gap": GAP, **options}
    opt = optimizer(p, name, rank=rank, weight_decay=0.1, **options)
    finish(opt, p, stream)
    return p, opt


def snapshot(p, opt):
    return p.detach().clone(), {key: value.clone() for key, value in opt.state[p].items()}


def assert_same(before, after, *, but=()):
    assert torch.equal(before[0], after[0])
    for key in before[1]:
        if key not in but:
            assert torch.equal(before[1][key], after[1][key]), key


def poisoned(G, kind):
    bad = G.clone()
    first = (0,) * G.dim()  # one entry of the first slice
    if kind == "nan":
        bad[first] = NAN
    elif kind == "inf":
        bad[first] = -INF
    elif kind == "all nan":
        bad.fill_(NAN)
    elif kind == "huge":
        bad *= 1e25 / bad.abs().max()  # finite, the squares are not
    return bad


# ---- not finite -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("shape, rank", KINDS)
@pytest.mark.parametrize("kind", ["nan", "inf", "all nan", "huge"])
def test_a_run_with_bad_gradients_equals_the_run_that_never_saw_them(name, shape, rank, kind):
    """Before the first basis, at a refresh and within an interval."""
    good = gradients(shape, 10)
    bad = poisoned(good[0], kind)
    p, opt = train(name, shape, rank, good)
    q, other = train(name, shape, rank, [bad, bad, *good[:4], bad, *good[4:6], bad, *good[6:], bad])
    assert_same(snapshot(p, opt), snapshot(q, other), but=("skipped",))
    assert int(other.state[q]["skipped"]) == 5
    assert int(opt.state[p]["skipped"]) == 0
    assert int(other.state[q]["step"]) == 10


@pytest.mark.parametrize("name", PLAIN)
def test_a_stack_whose_slices_overflow_only_together_is_not_refreshed_either(name):
    good = gradients(STACK, 6)
    bad = torch.stack([G / G.norm() * 1.7e19 for G in good[0]])  # ||G||^2 = 2.9e38 each; fp32 ends at 3.4e38
    p, opt = train(name, STACK, 4, good)  # rank 4 of 5 sees enough of every slice
    q, other = train(name, STACK, 4, [bad, *good[:4], bad, *good[4:]])
    assert int(other.state[q]["skipped"]) == 2
    assert_same(snapshot(p, opt), snapshot(q, other), but=("skipped",))


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("shape, rank", KINDS)
@pytest.mark.parametrize("when", [0, 2, GAP])
@pytest.mark.parametrize("kind", ["outside the first axes", "just under overflow", "just over overflow"])
def test_an_enormous_finite_gradient_leaves_everything_finite(name, shape, rank, kind, when):
    """What is seen of it may be harmless (its projection), what is not seen must do no harm (its residual)."""
    stream = gradients(shape, 10)
    if kind == "outside the first axes":
        stream[when] = torch.zeros(shape)
        stream[when][(..., -1, -1)] = 3e38
    else:  # ||G||^2 of the largest slice against fp32's 3.4e38, of which the projection holds a share
        stream[when] *= {"just under overflow": 1.7e19, "just over overflow": 2e19}[kind] / stream[when].norm()
    p, opt = train(name, shape, rank, stream)
    assert torch.isfinite(p).all()
    for key, value in opt.state[p].items():
        assert torch.isfinite(value).all(), key


@pytest.mark.parametrize("size", [1e9, 1e15])
def test_what_foam_squares_itself_need_not_be_squared_again(size):
    """It projects G and G∘G; every other row steps by a gradient of this size."""
    p = weight(WIDE)
    opt = optimizer(p, "foam_adamw", rank=0.5)
    finish(opt, p, [G * size for G in gradients(WIDE, 3)])
    assert int(opt.state[p]["step"]) == 3
    assert int(opt.state[p]["skipped"]) == 0


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [3, None])
def test_a_skipped_step_leaves_the_rounding_of_later_ones_alone(name, dtype, rank):
    good = [G / 4 for G in gradients(WIDE, 8)]
    bad = poisoned(good[0], "nan")
    p, opt = train(name, WIDE, rank, good, dtype=dtype)
    q, other = train(name, WIDE, rank, [*good[:3], bad, *good[3:]], dtype=dtype)
    assert_same(snapshot(p, opt), snapshot(q, other), but=("skipped",))


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [3, None])
def test_a_gradient_whose_squares_overflow_its_own_dtype_only_is_a_good_one(name, dtype, rank):
    """fp16 ends at 65504: a norm of 256 is nothing unusual."""
    stream = [G.to(dtype) * 100 for G in gradients(WIDE, 3)]
    p, opt = train(name, WIDE, rank, stream, dtype=dtype)
    assert int(opt.state[p]["skipped"]) == 0
    assert int(opt.state[p]["step"]) == 3


@pytest.mark.parametrize("name", COVERING)
def test_one_bad_gradient_does_not_hold_up_the_other_parameters(name):
    ps = [weight(WIDE), weight(TALL), weight((5,)), weight((4,))]
    groups = [{"params": ps[:2], **fitting(name, {"rank": 2})}, {"params": ps[2:]}]
    opt = LowRankOptimizer(groups, name)
    before = [p.detach().clone() for p in ps]
    for i, p in enumerate(ps):
        p.grad = torch.full_like(p, NAN)
        if i % 2:
            p.grad = gradients(p.shape, 1)[0] if p.dim() > 1 else torch.ones_like(p)
    opt.step()
    assert [torch.equal(a, b) for a, b in zip(before, ps, strict=True)] == [True, False, True, False]
    assert [int(opt.state[p]["skipped"]) for p in ps] == [1, 0, 1, 0]


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("last_expert", [False, True])
def test_a_bad_slice_skips_its_whole_parameter(name, last_expert):
    stream, p = gradients(STACK, 6), weight(STACK)
    opt = optimizer(p, name, rank=2, update_proj_gap=GAP)
    finish(opt, p, stream[:3])
    before = snapshot(p, opt)
    bad = stream[3].clone()
    bad[-1 if last_expert else 0, 2, 3] = NAN
    finish(opt, p, [bad, bad])
    assert_same(before, snapshot(p, opt), but=("skipped",))
    assert int(opt.state[p]["skipped"]) == 2


# ---- missing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("shape, rank", KINDS)
def test_a_parameter_without_gradient_is_left_alone(name, shape, rank):
    good = gradients(shape, 6)
    p, opt = train(name, shape, rank, good)
    q, other = train(name, shape, rank, [None, *good[:3], None, None, *good[3:], None])
    assert_same(snapshot(p, opt), snapshot(q, other))
    assert int(other.state[q]["skipped"]) == 0


@pytest.mark.parametrize("name", COVERING)
def test_state_exists_for_every_parameter_from_the_first_step(name):
    ps = [weight(WIDE), weight(TALL), weight((5,))]
    opt = LowRankOptimizer([{"params": ps[:2], **fitting(name, {"rank": 2})}, {"params": ps[2:]}], name)
    ps[0].grad = gradients(WIDE, 1)[0]
    opt.step()
    assert all(len(opt.state[p]) > 0 for p in ps)
    assert all(isinstance(value, torch.Tensor) for p in ps for value in opt.state[p].values())


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("shape, rank", KINDS)
def test_a_learning_rate_of_zero_changes_nothing_but_the_moments(name, shape, rank):
    p, opt = train(name, shape, rank, gradients(shape, 6), lr=0.0)
    assert torch.equal(p, weight(shape))
    assert "exp_avg" not in opt.state[p] or opt.state[p]["exp_avg"].abs().max() > 0
    assert int(opt.state[p]["step"]) == 6


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("shape", [WIDE, TALL, STACK, (1, 7), (7, 1), (1, 1)])
def test_a_rank_above_the_short_side_is_clamped_to_it(name, shape):
    short = min(shape[-2:])
    got = [train(name, shape, rank, gradients(shape, 6))[0] for rank in (short, 1000)]
    assert torch.equal(*got)


@pytest.mark.parametrize(
    "rank, r", [(0.5, 3), (0.34, 2), (0.01, 1), ("0.5", 3), (2, 2), (2.0, 2), ("2", 2), (1, 1), (0.999, 6)]
)
def test_a_rank_below_one_is_a_fraction_of_the_short_side(rank, r):
    for shape in (WIDE, TALL):
        p, opt = train("galore_dominant_adamw", shape, rank, gradients(shape, 1))
        assert opt.state[p]["basis"].shape == (min(shape), r)
        assert opt.state[p]["exp_avg"].shape == (r, *wide(p).shape[1:])
