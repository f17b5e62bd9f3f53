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
    optimizer,
    run,
    weight,
)

from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.methods import registry, resolve
from hf_lowrank.tensors.bases import SelectedRows
from hf_lowrank.tensors.row_blocks import Blocks


GAP = 5
ADAM = [n for n in COVERING if METHODS[n].moments == "adam"]
BY_AXIS = [  # rules that tell outputs from inputs
    n
    for n in NAMES
    if METHODS[n].moments in ("adam_mini", "normuon", "racs", "rmnp", "sinkhorn")
    or METHODS[n].subspace in ("haar", "fold")
    or n == "scale_sgd"
]


def composable(name):
    made = resolve.parts(name, {})
    return all(getattr(made, kind).composable for kind in registry.KINDS)


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


def test_a_piece_without_rows_or_matrices_projects_to_nothing():
    """With more processes than rows, or than matrices of a stack, some hold none: their part of a sum is zero."""
    empty = SelectedRows(torch.tensor([1, 3]), torch.ones(2)).rows(5, 0)
    W = torch.zeros(0, 4)
    assert torch.equal(empty.project(W), torch.zeros(2, 4))
    empty.add_(W, torch.ones(2, 4), beta=1.0, alpha=1.0)
    assert Blocks(6, 4, 1.0).fold(torch.zeros(0, 6, 3)).shape == (0, 2, 3)
