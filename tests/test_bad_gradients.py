"""Bad gradients, odd shapes and bad options (design.md section 2)."""

from __future__ import annotations

import pytest
import torch
from fitting import fitting
from streams import (
    COVERING,
    NAMES,
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
    wide,
)

from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.methods import resolve


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
        p.grad = torch.ones_like(p) if i % 2 else torch.full_like(p, NAN)
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
    assert opt.state[p]["exp_avg"].abs().max() > 0
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


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("rank", [3, None])
def test_sparse_gradients_are_refused_before_anything_moves(name, rank):
    p, other = weight(WIDE), weight(WIDE)
    opt = optimizer([other, p], name, rank=rank)
    p.grad, other.grad = torch.zeros(WIDE).to_sparse(), torch.ones(WIDE)
    with pytest.raises(ValueError, match="sparse"):
        opt.step()
    assert torch.equal(other, weight(WIDE))


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_number_formats_are_refused_by_name(rank, dtype):
    p = torch.nn.Parameter(torch.zeros(WIDE, dtype=dtype))
    with pytest.raises(ValueError, match=str(dtype)):
        optimizer(p, "galore_dominant_adamw", rank=rank)


@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4, 5), (0, 4)])
def test_only_matrices_and_stacks_of_them_are_projected(shape):
    with pytest.raises(ValueError, match="rank"):
        optimizer(torch.nn.Parameter(torch.zeros(shape)), "galore_dominant_adamw")
    optimizer(torch.nn.Parameter(torch.zeros(shape)), "galore_dominant_adamw", rank=None)


def test_a_parameter_in_two_groups_is_refused_and_nothing_is_added():
    p = weight(WIDE)
    opt = optimizer(p, "galore_dominant_adamw")
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [p]})
    with pytest.raises(ValueError, match="only matrices"):
        opt.add_param_group({"params": [weight((5,))], "rank": 2})
    assert len(opt.param_groups) == 1


ZERO_UP = r"(>= 0|\[0, inf\))"
BAD = [
    ("lr", -1e-3, ZERO_UP),
    ("lr", NAN, ZERO_UP),
    ("lr", INF, ZERO_UP),
    ("lr", "fast", ZERO_UP),
    ("lr", None, ZERO_UP),
    ("eps", -1.0, ZERO_UP),
    ("eps", NAN, ZERO_UP),
    ("eps", "small", ZERO_UP),
    ("weight_decay", -0.1, ZERO_UP),
    ("weight_decay", INF, ZERO_UP),
    ("weight_decay", "some", ZERO_UP),
    ("betas", (0.9, 1.0), r"\[0, 1\)"),
    ("betas", (-0.1, 0.9), r"\[0, 1\)"),
    ("betas", (NAN, 0.9), r"\[0, 1\)"),
    ("betas", (0.9,), r"\[0, 1\)"),
    ("betas", (0.9, 0.99, 0.999), r"\[0, 1\)"),
    ("betas", 0.9, r"\[0, 1\)"),
    ("betas", ("high", 0.9), r"\[0, 1\)"),
    ("betas", None, r"\[0, 1\)"),
    ("rank", 0, "integer >= 1"),
    ("rank", -4, "integer >= 1"),
    ("rank", 2.5, "integer >= 1"),
    ("rank", NAN, "integer >= 1"),
    ("rank", INF, "integer >= 1"),
    ("rank", "many", "integer >= 1"),
    ("rank", True, "integer >= 1"),
    ("rank", None, "integer >= 1"),
    ("update_proj_gap", 0, "integer >= 1"),
    ("update_proj_gap", -5, "integer >= 1"),
    ("update_proj_gap", 2.5, "integer >= 1"),
    ("update_proj_gap", NAN, "integer >= 1"),
    ("update_proj_gap", "often", "integer >= 1"),
    ("update_proj_gap", None, "integer >= 1"),
    ("scale", 0.0, "> 0"),
    ("scale", -1.0, "> 0"),
    ("scale", NAN, "> 0"),
    ("scale", INF, "> 0"),
    ("scale", "large", "> 0"),
    ("proj_type", "both", "std, paper, reverse_std, left, right"),
    ("on_refresh", "forget", "keep, rotate"),
    ("stagger", "perhaps", "true or false"),
    ("stagger", 2, "true or false"),
    ("correct_bias", "maybe", "true or false"),
    ("seed", -1, "integer >= 0"),
    ("seed", "dice", "integer >= 0"),
]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("option, value, valid", BAD)
def test_a_bad_value_is_refused_with_what_is_valid(name, option, value, valid):
    with pytest.raises(ValueError, match=f"(?s){option}.*{valid}"):
        LowRankOptimizer([{"params": [weight(WIDE)], "rank": 3, option: value}], name)


@pytest.mark.parametrize(
    "option, value, valid", [case for case in BAD if case[0] in ("lr", "eps", "weight_decay", "betas")]
)
def test_a_bad_value_is_refused_for_dense_groups_and_as_an_argument_too(option, value, valid):
    with pytest.raises(ValueError, match=f"(?s){option}.*{valid}"):
        LowRankOptimizer([{"params": [weight(WIDE)], option: value}], "galore_dominant_adamw")
    with pytest.raises(ValueError, match=f"(?s){option}.*{valid}"):
        LowRankOptimizer([weight(WIDE)], "galore_dominant_adamw", **{option: value})


@pytest.mark.parametrize("name, option, value, valid", [
    ("galore_dominant_adamw", "refresh", "magic", "gram, svd, randomized, power"),
    ("galore_i3s_adamw", "refresh", "randomized", "gram, svd"),
    ("galore_i3s_adamw", "refresh", "power", "gram, svd"),
    ("galore_hybrid_adamw", "r0", -1, "integer >= 0"),
    ("galore_hybrid_adamw", "r0", "half", "integer >= 0"),
    ("fira_adamw", "limiter", 1.0, "> 1"),
    ("fira_adamw", "limiter", NAN, "> 1"),
    ("fira_adamw", "fira_form", "other", "released, i3s, paper"),
    ("lowrank", "subspace", "dominnat", "dominant, golore, grassmann, hybrid, i3s"),
    ("lowrank", "moments", "atom", "adafactor, adam"),
    ("lowrank", "reconstruction", "fire", "error_feedback, fira, project"),
])  # fmt: skip
def test_a_bad_value_of_a_part_is_refused_with_what_is_valid(name, option, value, valid):
    with pytest.raises(ValueError, match=f"{option}.*{valid}"):
        LowRankOptimizer([{"params": [weight(WIDE)], "rank": 3, option: value}], name)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("typo, meant", [
    ("update_proj_gpa", "update_proj_gap"), ("scal", "scale"), ("on_refesh", "on_refresh"), ("proj_typ", "proj_type"),
    ("corect_bias", "correct_bias"), ("stager", "stagger"),
])  # fmt: skip
def test_an_unknown_option_is_refused_with_the_nearest_one(name, typo, meant):
    with pytest.raises(ValueError, match=f"no option '{typo}'; did you mean '{meant}'"):
        optimizer(weight(WIDE), name, **{typo: 1})


def test_an_option_of_another_method_is_refused():
    for option, value in (("r0", 2), ("limiter", 1.1), ("fira_form", "paper")):
        with pytest.raises(ValueError, match=f"no option '{option}'"):
            optimizer(weight(WIDE), "galore_dominant_adamw", **{option: value})
    with pytest.raises(ValueError, match="no option 'refresh'"):
        optimizer(weight(WIDE), "galore_random_adamw", refresh="gram")
    with pytest.raises(ValueError, match="no option 'scale'"):  # a dense group has none
        optimizer(weight(WIDE), "galore_dominant_adamw", rank=None, scale=1.0)


def test_an_unknown_method_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'galore_i3s_adamw'"):
        optimizer(weight(WIDE), "galore_i3_adamw")
    with pytest.raises(ValueError, match="Valid: .*galore_dominant_adamw"):
        optimizer(weight(WIDE), "zzz")


@pytest.mark.parametrize("name", COVERING)
def test_options_come_as_text_too(name):
    p, q = weight(WIDE), weight(WIDE)
    a = finish(optimizer(p, name, rank=3, update_proj_gap=2, scale=0.5, stagger=True), p, gradients(WIDE, 6))
    b = finish(optimizer(q, name, rank="3", update_proj_gap="2", scale="0.5", stagger="true"), q, gradients(WIDE, 6))
    assert torch.equal(a, b)


def test_defaults_are_the_documented_ones():
    group = resolve.complete("galore_dominant_adamw", {})
    assert (group["rank"], group["update_proj_gap"], group["proj_type"], group["scale"]) == (128, 200, "std", 0.25)
    how = {name: resolve.complete(name, {}).get("on_refresh") for name in NAMES}
    assert {how[name] for name in PLAIN if "hybrid" not in name} == {"keep"}
    assert {how[name] for name in NAMES if "hybrid" in name or "golore" in name} == {"rotate"}
    assert {how[name] for name in ("subtrack_pp_adamw", "ldadam")} == {"rotate_variance"}
    assert how["grass_adamw"] == "reset"
    assert {how[name] for name in NAMES if "apollo" in name} == {"keep"}
    scale = {name: resolve.complete(name, {})["scale"] for name in NAMES}
    ones = {"ldadam", "flora_adafactor", "apollo_random_adamw", "apollo_dominant_adamw"}
    assert {name for name in NAMES if scale[name] == 1.0} == ones | {name for name in NAMES if "msgd" in name}
    assert scale["apollo_mini_adamw"] == 128.0
    assert set(scale.values()) == {0.25, 1.0, 128.0}
