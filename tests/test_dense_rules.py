"""Rules of parameters without a subspace, against float64 references and by what they promise; what they keep."""

from __future__ import annotations

import warnings

import pytest
import torch
from comparing import STEPS, TOLERANCE
from distributed import models
from references.base import Adam, LowRank
from references.dense import ColumnNorm, MomentumColumnNorm, Sgd
from references.momentum import Momentum
from streams import TALL, WIDE, displacement, finish, gradients, optimizer, run, weight

from hf_lowrank import LowRankOptimizer, param_groups
from hf_lowrank.methods.dense import RULES


METHOD = "galore_dominant_adafactor"  # whose own rule is none of these
COMMON = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}
NAMED = [rule for rule in RULES if rule != "same"]
NORMALISED = ["column_norm", "momentum_column_norm"]
COUNTERS = 3 * 8  # step, moment_step, skipped


def dense(p, rule, *, method=METHOD, **options):
    return optimizer(p, method, rank=None, dense=rule, **{**COMMON, **options})


def reference(rule, kind):
    inputs = 1 if kind == "embedding" else 0  # the axis of the transposed weight along which an output's inputs lie
    made = {"column_norm": ColumnNorm(inputs), "momentum_column_norm": MomentumColumnNorm(inputs)}
    return {"adam": Adam(), "momentum": Momentum(), "sgd": Sgd(), **made}[rule]


def run_beside(p, start, stream, rule, kind, **options):
    """The weight, and that of the reference: its basis is the identity, seen transposed."""
    identity = {"rank": 1, "gap": 100, "choose": lambda G, r, old: torch.eye(*G.shape[:1], r).double()}
    setting = {**COMMON, **options}
    beta1, beta2 = setting.pop("betas")
    ref = LowRank(start.detach().clone(), moments=reference(rule, kind), beta1=beta1, beta2=beta2, transposed=True,
                  **identity, **setting)  # fmt: skip
    ref.rank = start.shape[1]
    for G in stream:
        ref.step(G)
    return finish(dense(p, rule, kind=kind, **options), p, stream), ref.weight


# ---- the mathematics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mixed", "embedding"])
@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("rule", NAMED)
def test_a_run_equals_the_reference(rule, shape, kind):
    p, start = weight(shape), weight(shape)
    ours, theirs = run_beside(p, start, gradients(shape, STEPS), rule, kind)
    assert displacement(theirs, ours, start) < TOLERANCE


def test_an_embedding_is_told_from_other_matrices():
    """Else one normalisation might stand in for the other."""
    ends = [finish(dense(p := weight(TALL), "column_norm", kind=kind), p, gradients(TALL, STEPS))
            for kind in ("mixed", "embedding")]  # fmt: skip
    assert displacement(*ends, weight(TALL)) > 1e-1


@pytest.mark.parametrize("rule", NORMALISED)
def test_tensors_of_four_axes_have_outputs_along_the_first(rule):
    shape = (5, 2, 3, 2)
    p, start, stream = weight(shape), weight(shape), [G.view(shape) for G in gradients((5, 12), STEPS)]
    finish(dense(p, rule), p, stream)
    flat, begin = weight((5, 12)), start.detach().view(5, 12)
    flat.data.copy_(begin)
    _, theirs = run_beside(flat, begin, [G.view(5, 12) for G in stream], rule, "mixed")
    assert displacement(theirs.view(shape), p, start) < TOLERANCE


@pytest.mark.parametrize("kind, axis", [("mixed", 1), ("head", 1), ("embedding", 0)])
@pytest.mark.parametrize("rule", NORMALISED)
def test_every_output_moves_by_the_rate_and_one_without_a_gradient_not_at_all(rule, kind, axis):
    p, start, [G] = weight(TALL), weight(TALL), gradients(TALL, 1)
    G = G * torch.logspace(-6, 6, TALL[1 - axis]).unsqueeze(axis)  # outputs of very different sizes
    G.select(1 - axis, 2).zero_()
    moved = start - finish(dense(p, rule, kind=kind, weight_decay=0.0), p, [G])
    rms = moved.square().mean(axis).sqrt() / COMMON["lr"]
    expected = torch.ones(TALL[1 - axis])
    expected[2] = 0.0
    # moved is a difference of fp32 numbers of 0.1 at most: 1e-8 of a step of 1e-2
    torch.testing.assert_close(rms, expected, rtol=1e-5, atol=0)
    assert torch.equal(p.select(1 - axis, 2), start.select(1 - axis, 2))


@pytest.mark.parametrize("rule", NORMALISED)
def test_the_size_of_the_gradients_does_not_matter(rule):
    ends = [finish(dense(p := weight(TALL), rule), p, [size * G for G in gradients(TALL, STEPS)])
            for size in (1.0, 2.0**20, 2.0**-20)]  # fmt: skip
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])  # powers of two


def test_without_memory_the_normalised_momentum_is_the_normalised_gradient():
    ends = [finish(dense(p := weight(TALL), rule, betas=(0.0, 0.95)), p, gradients(TALL, STEPS))
            for rule in NORMALISED]  # fmt: skip
    assert displacement(*ends, weight(TALL)) < 1e-6  # norms of another order of addition


@pytest.mark.parametrize("shape", [(9,), ()])
@pytest.mark.parametrize("rule", NORMALISED)
def test_vectors_take_adam_instead(rule, shape):
    stream = [G[0, : max(1, len(shape) * 9)].reshape(shape) for G in gradients((5, 9), STEPS)]
    ends = [finish(dense(p := weight(shape), chosen), p, stream) for chosen in (rule, "adam")]
    # the fused kernel divides by the square root of another order of the same factors: 1e-7 a step
    assert displacement(*ends, weight(shape)) < 1e-6


def test_same_is_what_the_method_does_by_itself():
    stream = gradients(TALL, STEPS)
    ends = [finish(optimizer(p := weight(TALL), METHOD, rank=None, **COMMON, **options), p, stream)
            for options in ({}, {"dense": "same"})]  # fmt: skip
    assert torch.equal(*ends)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["head", "embedding"])
@pytest.mark.parametrize("rule", NAMED)
def test_a_low_precision_weight_gets_the_exact_update_then_one_rounding(rule, kind, dtype):
    p, stream = weight(TALL, dtype=dtype), [G.to(dtype) for G in gradients(TALL, STEPS)]
    opt = dense(p, rule, kind=kind)
    twin = dense(exact := torch.nn.Parameter(p.detach().float()), rule, kind=kind)
    for G in stream:
        exact.data.copy_(p.detach())
        p.grad, exact.grad = G.clone(), G.float()
        opt.step()
        twin.step()
        _, exponent = torch.frexp(exact.detach())
        step = torch.ldexp(torch.ones_like(exact), (exponent - (8 if dtype == torch.bfloat16 else 11)).clamp_min(-24))
        assert ((p.detach().float() - exact.detach()).abs() <= step * 1.001).all()  # one unit in the last place


# ---- what is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule, moments", [
    ("adam", 2), ("momentum", 1), ("momentum_column_norm", 1), ("column_norm", 0), ("sgd", 0),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["head", "embedding"])
def test_state_is_as_many_moments_as_the_rule_has(rule, moments, kind):
    p = weight((64, 80))
    opt = dense(p, rule, kind=kind)
    eight = dense(weight((64, 80)), rule, kind=kind, dense_state_format="8bit")
    assert opt.declared_bytes() == moments * 4 * p.numel() + COUNTERS
    assert eight.declared_bytes() == moments * (p.numel() + 4 * 64) + COUNTERS  # a scale for every row
    finish(opt, p, [torch.randn(64, 80)])
    assert sum(x.numel() * x.element_size() for x in opt.state[p].values()) == opt.declared_bytes()


@pytest.mark.parametrize("kind", ["head", "embedding"])
@pytest.mark.parametrize("rule", ["momentum", "momentum_column_norm"])
def test_moments_of_8_bits_give_nearly_the_same_run(rule, kind):
    stream = gradients((64, 80), STEPS, decay=0.97)
    ends = [finish(dense(p := weight((64, 80)), rule, kind=kind, dense_state_format=form), p, stream)
            for form in ("fp32", "8bit")]  # fmt: skip
    # a code is off by 0.012 of the entry in the mean (see test_formats.py), and five of them are remembered
    assert 1e-6 < displacement(*ends, weight((64, 80))) < 0.03


@pytest.mark.parametrize("form", ["fp32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["head", "embedding"])
@pytest.mark.parametrize("rule", NAMED)
def test_a_resumed_run_is_the_same_bit_for_bit(rule, kind, dtype, form):
    shape, at = (64, 80), 4
    stream = gradients(shape, 2 * at, decay=0.97)
    options = {"kind": kind, "dense_state_format": form}
    whole = weight(shape, dtype=dtype)
    finish(dense(whole, rule, **options), whole, stream)
    first = dense(cut := weight(shape, dtype=dtype), rule, **options)
    finish(first, cut, stream[:at])
    second = dense(again := torch.nn.Parameter(cut.detach().clone()), rule, **options)
    second.load_state_dict(first.state_dict())
    assert torch.equal(finish(second, again, stream[at:]), whole)


@pytest.mark.parametrize("kind", ["head", "embedding"])
@pytest.mark.parametrize("rule", NAMED)
def test_a_gradient_that_is_not_finite_skips_its_parameter_alone(rule, kind):
    p, other = weight(TALL), weight(TALL)
    opt = dense([p, other], rule, kind=kind)
    for t, G in enumerate(gradients(TALL, 4)):
        before = {key: value.clone() for key, value in opt.state[p].items()}, p.detach().clone()
        p.grad, other.grad = G.clone(), G.clone()
        if t == 2:
            p.grad[3, 1] = float("nan")
        opt.step()
        if t == 2:
            assert torch.equal(p, before[1])
            changed = {key for key, value in opt.state[p].items() if not torch.equal(value, before[0][key])}
            assert changed == {"skipped"}
    assert int(opt.state[p]["step"]) == 3 and int(opt.state[other]["step"]) == 4
    assert p.isfinite().all() and other.isfinite().all()


def test_an_edit_may_change_a_rule_for_one_with_the_same_state_and_no_other():
    p = weight(TALL)
    opt = dense(p, "column_norm")
    steps = run(opt, p, gradients(TALL, 3))
    next(steps)
    opt.param_groups[0]["dense"] = "sgd"
    next(steps)
    opt.param_groups[0]["dense"] = "momentum"
    with pytest.raises(ValueError, match=r"dense \(sgd\) says which state there is"):
        next(steps)


def test_a_rule_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ValueError, match="dense must be one of same, adam, momentum, .*, got 'adm'"):
        dense(weight(TALL), "adm")
    with pytest.raises(ValueError, match="no option 'dense'"):  # a group of matrices has a subspace
        LowRankOptimizer([{"params": [weight(TALL)], "rank": 3, "dense": "adam"}], METHOD)


def test_groups_that_do_not_tell_heads_from_others_are_not_taken_in_silence_by_a_method_that_does():
    net = models.model()
    with pytest.warns(UserWarning, match=r"rules of its own for embeddings and heads.*method='scale_sgd'"):
        LowRankOptimizer(param_groups(net, rank=3), "scale_sgd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LowRankOptimizer(param_groups(net, method="scale_sgd"), "scale_sgd")
        LowRankOptimizer(param_groups(net, rank=3), "full_adamw")
        only_mixed = torch.nn.Sequential(models.Block(10, 15, 0), torch.nn.Conv1d(3, 3, 3))
        LowRankOptimizer(param_groups(only_mixed, method="scale_sgd"), "scale_sgd")
