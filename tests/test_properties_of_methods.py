"""What papers promise of single methods, seen from the optimizer: identities, invariances, laws of what is drawn."""

from __future__ import annotations

import pytest
import torch
from comparing import GAP, STEPS, TOLERANCE, compare, optimizer, references
from references.quantized import four_bits, intervals
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
    run,
    weight,
    wide,
)
from test_sampling import DRAWS, assert_follows, plackett_luce

from hf_lowrank import METHODS
from hf_lowrank.methods import resolve
from hf_lowrank.methods.registry import classes
from hf_lowrank.state.formats import FORMATS


SHAPES = [WIDE, TALL, SQUARE, STACK]


def held(opt, p, name):
    return opt.state[p][name].double()


# ---- bases of singular vectors, and of none -------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in PLAIN if METHODS[n].subspace in ("i3s", "uniform", "hybrid")])
def test_a_sampled_basis_is_sorted_singular_vectors_with_the_sign_rule(name):
    stream, p = gradients(TALL, STEPS), weight(TALL)
    opt = optimizer(p, name, rank=4, update_proj_gap=GAP)
    old, drawn = None, set()
    for t in run(opt, p, stream):
        if t % GAP:
            continue
        P = opt.state[p]["basis"].double().clone()
        U = torch.linalg.svd(stream[t].double().T, full_matrices=False)[0]
        cosines = U.T @ P
        index = cosines.abs().argmax(0)
        # fp32 singular vectors of values that are 0.7 apart: some 1e-5 off
        assert (cosines.gather(0, index[None]).abs() - 1).abs().max() < 1e-4
        assert (index[1:] > index[:-1]).all()
        if METHODS[name].subspace == "hybrid":
            assert index[:2].tolist() == [0, 1]  # r0 = rank / 2 by default
        pivot = P.gather(0, P.abs().argmax(0, keepdim=True)) if old is None else (P.T @ old).diagonal()
        assert (pivot >= 0).all()
        old = P
        drawn.add(tuple(index.tolist()))
    assert len(drawn) > 1


def test_a_random_basis_does_not_look_at_the_gradient():
    bases = []
    for seed in (0, 1):
        p = weight(WIDE)
        opt = optimizer(p, "galore_random_adamw", update_proj_gap=GAP)
        finish(opt, p, gradients(WIDE, STEPS, seed=seed))
        bases.append(opt.state[p]["basis"])
    assert torch.equal(*bases)


# ---- Q-GaLore -------------------------------------------------------------------------------------------------------


def test_q_galores_intervals_follow_the_overlaps_of_the_subspaces():
    """A gradient that stands still, then one without a memory, then still again; some 30 refreshes of 70 steps."""
    shape = (12, 20)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(t)) for t in range(16)]
    still = gradients(shape, 1)[0]
    stream = [still] * 26 + noise + [still] * 28
    due: list[tuple[int, int]] = []

    def each(t, group, refs):
        due.append((int(opt.state[p]["refresh_at"]), refs[0].due))

    p = weight(shape)
    opt = optimizer(p, "q_galore_adamw", rank=2, update_proj_gap=1)
    distance, [ref] = compare(p, opt, stream, each=each)
    assert distance < TOLERANCE
    assert all(ours == theirs for ours, theirs in due)
    lengths = intervals(ref.overlaps, 1)
    assert max(lengths) >= 4 and any(b < a for a, b in zip(lengths, lengths[1:], strict=False))  # there and back


def test_q_galore_steps_in_the_basis_as_its_four_bits_give_it_back():
    """What is stored is what this packs by itself, but for codes that rounding decides (bases are exact to 1e-4)."""
    shape, rank = (128, 160), 32  # 4096 numbers: the smallest basis that is packed
    p, stream = weight(shape), gradients(shape, STEPS, decay=0.97)
    opt, seen = optimizer(p, "q_galore_adamw", rank=rank), []

    def store(P):
        raw = opt.state[p]
        assert raw["basis"].dtype == torch.uint8 and raw["basis"].shape == (128 * rank // 2,)
        codes = torch.stack([raw["basis"] % 16, raw["basis"] // 16], 1).flatten().double()
        kept = ((codes.view(-1, 128) - 7) / 7 * raw["basis.absmax"].double()[:, None]).view(P.shape)
        level = P.reshape(-1, 128)
        level = 7 * level / level.abs().amax(1, keepdim=True)
        tie = ((level - level.floor() - 0.5).abs() < 1e-2).view(P.shape)
        assert ((kept - four_bits(P)).abs() < 1e-4)[~tie].all() and tie.float().mean() < 0.05
        seen.append(kept)
        return kept

    refs = references(p, opt)
    refs[0].store = store
    start = p.detach().clone()
    for t in run(opt, p, stream):
        refs[0].step(stream[t])
    assert displacement(refs[0].weight, p, start) < TOLERANCE and len(seen) == 4


# ---- LDAdam ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("gap", [1, 3])
def test_ldadams_error_feedback_loses_nothing(shape, gap):
    """sum_s P_s M_s + b1 / (1 - b1) P_t M_t + E_t = sum_s G_s, which V has no part in."""
    p = weight(shape)
    opt = optimizer(p, "ldadam", rank=2, update_proj_gap=gap)
    taken = seen = 0.0
    stream = gradients(shape, 20)
    for t in run(opt, p, stream):
        PM = held(opt, p, "basis") @ held(opt, p, "exp_avg")
        taken, seen = taken + PM, seen + wide(stream[t], "paper").double()
        total = taken + 0.8 / 0.2 * PM + held(opt, p, "error")
        assert (total - seen).norm() < 1e-6 * (t + 1) * stream[t].norm()  # fp32, added up over the steps


@pytest.mark.parametrize("form, loss", [("bf16", 2**-9), ("8bit", 0.012)])  # see test_formats.py
def test_an_error_in_fewer_bits_loses_its_rounding_and_no_more(form, loss):
    shape = (64, 80)  # 5120 numbers: enough to be kept in 8 bits
    p = weight(shape)
    opt = optimizer(p, "ldadam", rank=8, error_feedback=form)
    taken = seen = bound = 0.0
    stream = gradients(shape, STEPS, decay=0.97)
    for t in run(opt, p, stream):
        PM, E = (
            held(opt, p, "basis") @ held(opt, p, "exp_avg"),
            FORMATS[form].decode(opt.state[p], "error", opt.plan(p).buffers["error"]).double(),
        )
        taken, seen, bound = taken + PM, seen + stream[t].double(), bound + loss * E.norm()
        lost = (taken + 0.8 / 0.2 * PM + E - seen).norm()
        assert 0.01 * bound < lost < bound


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_with_error_feedback_low_rank_momentum_moves_the_weight_as_full_momentum_does_in_the_end(shape):
    """The same identity seen from the weight: V held at 1 is moments=momentum."""
    p, parts = weight(shape), {"subspace": "block_power", "moments": "momentum", "reconstruction": "error_feedback"}
    opt = optimizer(p, "lowrank", **parts, rank=2, on_refresh="rotate", update_proj_gap=1, weight_decay=0.0, scale=1.0)
    start, stream = p.detach().double(), gradients(shape, 20)
    finish(opt, p, stream)
    moved = wide(start - p.detach().double()) / 1e-2
    total = moved + 0.8 / 0.2 * held(opt, p, "basis") @ held(opt, p, "exp_avg") + held(opt, p, "error")
    seen = wide(sum(stream)).double()
    assert (total - seen).norm() < 1e-5 * seen.norm()


# ---- SubTrack -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["subtrack_adamw", "subtrack_pp_adamw"])
@pytest.mark.parametrize("drift", [0.1, 3.0])
def test_subtracks_line_search_never_loses_energy(shape, name, drift):
    p = weight(shape)
    opt = optimizer(p, name, rank=2, update_proj_gap=1)
    stream = gradients(shape, 20, drift=drift)
    before, gained = None, 0.0
    for t in run(opt, p, stream):
        G, P = wide(stream[t]).double(), opt.state[p]["basis"].double()
        if before is not None:
            old, new = ((Q.mT @ G).square().sum((-2, -1)) for Q in (before, P))
            assert (new >= old * (1 - 1e-6)).all()  # fp32 bases
            gained = max(gained, float((new / old).max()))
        assert (P.mT @ P - torch.eye(2)).abs().max() < 1e-5
        before = P
    assert gained > 1.001


@pytest.mark.parametrize("step", ["auto", "normalized"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_scaling_the_gradients_leaves_subtracks_bases(step, accumulate):
    bases = {}
    for size in (1.0, 1000.0):
        p = weight(TALL)
        opt = optimizer(p, "subtrack_adamw", step=step, eta=0.3, accumulate=accumulate)
        bases[size] = [opt.state[p]["basis"].clone() for _ in run(opt, p, [size * G for G in gradients(TALL, STEPS)])]
    for a, b in zip(*bases.values(), strict=True):
        assert (a - b).abs().max() < 1e-5  # 1000 is no power of two: the last bits differ
    assert (bases[1.0][0] - bases[1.0][-1]).norm() > 1e-2


# ---- Natural GaLore -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind, damping", [("relative", 0.1), ("absolute", 30.0)])
def test_natural_galores_solve_is_the_dense_solve(shape, kind, damping):
    """With b1 = 0 the first moment is F^-1 g itself, in units of a relative damping."""
    p, stream = weight(shape), gradients(shape, 7)
    opt = optimizer(
        p, "natural_galore_adamw", damping_kind=kind, damping=damping, update_proj_gap=100, betas=(0.0, 0.9)
    )
    for t in run(opt, p, stream):
        P = opt.state[p]["basis"].double()
        H = torch.stack([(P.mT @ wide(G).double()).flatten(-2) for G in stream[max(0, t - 3) : t + 1]], -1)
        gram = H.mT @ H
        share = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] if kind == "relative" else 1.0
        F = damping * share * torch.eye(H.shape[-2]) + H @ H.mT
        unit = damping * share if kind == "relative" else 1.0
        natural = (unit * torch.linalg.solve(F, H[..., -1:])).squeeze(-1)
        assert (opt.state[p]["exp_avg"].double().flatten(-2) - natural).norm() < 1e-5 * natural.norm()


def test_relative_damping_does_not_see_the_size_of_the_gradients():
    runs = {}
    for kind, damping in (("relative", 0.1), ("absolute", 1.0)):
        for size in (1.0, 1000.0):
            p = weight(TALL)
            opt = optimizer(p, "natural_galore_adamw", damping_kind=kind, damping=damping, eps=1e-12)
            runs[kind, size] = finish(opt, p, [size * G for G in gradients(TALL, STEPS)])
    start = weight(TALL)
    assert displacement(runs["relative", 1.0], runs["relative", 1000.0], start) < TOLERANCE
    assert displacement(runs["absolute", 1.0], runs["absolute", 1000.0], start) > 1e-2


# ---- GWT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 16), (7, 13)])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_gwts_transform_is_orthogonal(shape, level):
    """Where all denominators are one number the step is the inverse transform of the transform: G itself."""
    p, [G] = weight(shape), gradients(shape, 1)
    start = p.detach().clone()
    options = {"lr": 1.0, "eps": 1e6, "betas": (0.0, 0.5), "weight_decay": 0.0, "scale": 1e6, "correct_bias": False}
    finish(optimizer(p, "gwt_adamw", rank=2.0**-level, **options), p, [G])
    assert (start - p.detach() - G).norm() < 1e-5 * G.norm()


# ---- Grass ----------------------------------------------------------------------------------------------------------

ROW_NORMS = torch.tensor([4.0, 3.0, 2.0, 1.0])


def drawn_rows(rule, r):
    """Row indices and scales (DRAWS, r) of one refresh of DRAWS equal matrices with these norms of the rows."""
    gen = torch.Generator().manual_seed(3)
    G = torch.randn(4, 6, generator=gen)
    G = G / G.norm(dim=1, keepdim=True) * ROW_NORMS[:, None]
    p = torch.nn.Parameter(torch.zeros(DRAWS, 4, 6))
    opt = optimizer(p, "grass_adamw", rank=r, rows=rule)
    finish(opt, p, [G.expand(DRAWS, 4, 6)])
    return opt.state[p]["row_index"], opt.state[p]["row_scale"]


@pytest.mark.parametrize("rule, weights", [("norm", [4, 3, 2, 1]), ("uniform", [1, 1, 1, 1])])
def test_grass_draws_with_replacement_by_the_law_and_without_bias(rule, weights):
    index, scale = drawn_rows(rule, 1)
    assert_follows(index, plackett_luce([float(w) for w in weights], 1))
    index, scale = drawn_rows(rule, 2)
    assert (index[:, 0] == index[:, 1]).any()  # a row may come twice
    q = torch.tensor(weights) / sum(weights)
    torch.testing.assert_close(scale, (2 * q[index]).rsqrt())
    kept = torch.zeros(DRAWS, 4).scatter_add_(1, index, scale.square())  # the diagonal of P P^T
    assert ((kept.mean(0) - 1).abs() <= 5 * kept.std(0) / DRAWS**0.5).all()


@pytest.mark.parametrize("rule, weights", [("norm_without", [4, 3, 2, 1]), ("uniform_without", [1, 1, 1, 1])])
def test_grass_draws_without_replacement_by_the_law(rule, weights):
    index, scale = drawn_rows(rule, 2)
    assert_follows(index, plackett_luce([float(w) for w in weights], 2))
    assert (scale == 1).all()


def test_grass_takes_the_largest_rows():
    index, scale = drawn_rows("top", 2)
    assert (index == torch.tensor([0, 1])).all() and (scale == 1).all()


# ---- sketches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flora_adafactor", "apollo_random_adamw", "apollo_mini_adamw"])
@pytest.mark.parametrize("at", [3, 5, 7])
def test_a_sketch_is_no_state_and_a_resumed_run_draws_the_same(name, at):
    stream = gradients(WIDE, STEPS)
    whole, cut = weight(WIDE), weight(WIDE)
    finish(optimizer(whole, name), whole, stream)
    first = optimizer(cut, name)
    finish(first, cut, stream[:at])
    assert not any(value.shape[-2:] in ((6, 3), (6, 1)) for value in first.state[cut].values())
    again = torch.nn.Parameter(cut.detach().clone())
    second = optimizer(again, name)
    second.load_state_dict(first.state_dict())
    assert torch.equal(finish(second, again, stream[at:]), whole)


# ---- how tensors lie, and what is wrapped ---------------------------------------------------------------------------


WHOLE = {"subspace": "whole", "reconstruction": "scaled_gradient", "proj_type": "right"}


@pytest.mark.parametrize("name, options", [
    *(pytest.param(name, {}, id=name) for name in COVERING),
    pytest.param("full_adamw", {"stable_spam": True}, id="stable_spam"),
    pytest.param("lowrank", WHOLE, id="whole"),
])  # fmt: skip
@pytest.mark.parametrize("shape", [WIDE, TALL], ids=["wide", "tall"])
def test_a_weight_and_gradients_that_lie_transposed_in_memory_make_the_same_step(name, options, shape):
    ends = []
    for turn in (False, True):
        p = weight(shape)
        if turn:
            p = torch.nn.Parameter(p.detach().mT.contiguous().mT)
        opt = optimizer(p, name, **options)
        for t, G in enumerate(gradients(shape, STEPS)):
            p.grad = G.to(p.dtype).mT.contiguous().mT if turn and t % 2 else G.to(p.dtype).contiguous()
            opt.step()
        ends.append(p)
    # products of other strides round otherwise, which iterations in bf16 tip
    assert displacement(ends[1], ends[0], weight(shape)) < (2e-2 if "muon" in name or "swan" in name else 1e-4)


WRAPPED = [name for name in NAMES if "stable_spam" in resolve.complete(name, {})]


@pytest.mark.parametrize("name", WRAPPED)
def test_what_takes_out_spikes_leaves_the_rest_of_a_method_as_it_is(name):
    plain, spam = (resolve.parts(name, {**resolve.complete(name, {}), "stable_spam": on}) for on in (False, True))
    inner, outer = plain.reconstruction, spam.reconstruction
    assert outer.rate(128.0) == inner.rate(128.0) and outer.gauges == inner.gauges
    for what in ("needs_momentum", "needs_orthonormal", "scales_residual"):
        assert getattr(outer, what) == getattr(inner, what)


RUNNING_MEANS = [
    key
    for key, moments in classes("moments").items()
    if moments.composable and moments.keeps_momentum and moments.of_gradients
]


@pytest.mark.parametrize("options", [{}, {"first_momentum": "gradient"}], ids=["damped", "gradient"])
@pytest.mark.parametrize("key", RUNNING_MEANS)
def test_the_mean_of_a_constant_gradient_is_that_gradient(key, options):
    """Which a subspace weighs against the next one."""
    if options and key != "momentum":
        pytest.skip("an option of momentum SGD")
    p, G = weight(WIDE), gradients(WIDE, 1)[0]
    given = {"subspace": "random", "moments": key, "reconstruction": "project", "update_proj_gap": 100, **options}
    opt = optimizer(p, "lowrank", rank=4, **given)
    for _ in range(3):
        p.grad = G.to(p.dtype)
        opt.step()
    (unit,) = opt._work.matrices
    R = unit.basis_in_use().project(G.float())
    assert torch.allclose(unit.config.parts.moments.mean_gradient(unit.view, unit.context()), R, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, options", [("full_adamw", {}), ("full_adamw", {"stable_spam": True})])
def test_a_checkpoint_goes_on_in_a_weight_that_lies_the_other_way(name, options):
    p, stream = weight(WIDE), gradients(WIDE, STEPS)
    opt = optimizer(p, name, **options)
    finish(opt, p, stream[:4])
    q = torch.nn.Parameter(p.detach().mT.contiguous().mT)
    other = optimizer(q, name, **options)
    other.load_state_dict(opt.state_dict())
    for one, x in ((opt, p), (other, q)):
        finish(one, x, stream[4:])
    assert displacement(q, p, weight(WIDE)) < TOLERANCE
