"""Matrices of one shape that step as one, as they do on an accelerator: the same numbers, the same checkpoints."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from fitting import fitting
from streams import COVERING, gradients, weight

from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.engine import refresh, stacks, step
from hf_lowrank.methods import resolve


SHAPES = [(6, 11)] * 3 + [(11, 6)] * 2 + [(7, 7)] * 2 + [(3, 5, 9), (4,)]
STEPS, GAP = 12, 5


def may_be_stacked(name):
    parts = resolve.parts(name, {})
    counts = METHODS[name].moments == "natural_adam"  # of what is in its window
    return parts.reconstruction.by_columns and not parts.subspace.needs_gradient and not counts


STACKED = [name for name in COVERING if may_be_stacked(name)]


@pytest.fixture
def at_once(monkeypatch):
    """What the engine does on an accelerator, on the CPU."""
    monkeypatch.setattr(step, "at_once", lambda device: True)


def model(dtype=torch.float32, shapes=SHAPES):
    return [weight(shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def optimizer(name, params, **options):
    matrices = fitting(name, {"rank": 3, "update_proj_gap": GAP, "stagger": False} | options)
    groups = [{"params": params[:-1], **matrices}, {"params": params[-1:]}]
    return LowRankOptimizer(groups, name, lr=1e-2, weight_decay=0.1)


@cache
def stream(shape, seed):
    if len(shape) > 1:
        return gradients(shape, STEPS, seed=seed)
    return [G[0, : shape[0]] for G in gradients((shape[0], shape[0]), STEPS, seed=seed)]


def train(opt, params, steps, *, missing=()):
    """Step through the streams; some gradients, by (step, parameter), are missing or bad."""
    missing = dict(missing)
    for t in steps:
        for i, p in enumerate(params):
            what = missing.get((t, i), "good")
            p.grad = None if what == "none" else stream(p.shape, i)[t].to(p.dtype).clone()
            if what == "bad":
                p.grad.view(-1)[0] = torch.nan
            if what == "zeros":
                p.grad.zero_()
        opt.step()
    return [p.detach().clone() for p in params]


def same(a, b, exact):
    for x, y in zip(a, b, strict=True):
        if exact:
            assert torch.equal(x, y)
        else:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", STACKED)
def test_stacks_equal_matrices_one_by_one(name, monkeypatch):
    plain = model()
    expected = train(optimizer(name, plain), plain, range(STEPS))
    monkeypatch.setattr(step, "at_once", lambda device: True)
    params = model()
    opt = optimizer(name, params)
    got = train(opt, params, range(STEPS))
    assert any(len(stack.members) == 3 for stack in opt._work.stacks)
    same(expected, got, exact=False)


@pytest.mark.parametrize("name", ["galore_dominant_adamw", "galore_i3s_msgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_kernels_allow_it_they_are_equal_bit_for_bit(name, dtype, monkeypatch):
    """Lengths are multiples of the processor's vectors: the fused kernel rounds a rest of a tensor in another way."""
    shapes = [(8, 16)] * 3 + [(32, 16)] * 2 + [(16,)]
    plain = model(dtype, shapes)
    expected = train(optimizer(name, plain, rank=4), plain, range(STEPS))
    monkeypatch.setattr(step, "at_once", lambda device: True)
    params = model(dtype, shapes)
    opt = optimizer(name, params, rank=4)
    same(expected, train(opt, params, range(STEPS)), exact=True)
    assert len(opt._work.stacks) == 2


UNEVEN = {
    (2, 1): "bad",
    (3, 0): "none",
    (GAP, 2): "bad",
    (GAP, 5): "zeros",
    (7, 4): "none",
    (7, 8): "bad",
    (8, 3): "bad",
    (8, 4): "bad",
}


@pytest.mark.parametrize("name", ["galore_i3s_adamw", "fira_adamw", "apollo_random_adamw"])
@pytest.mark.parametrize("how", ["keep", "reset"])
def test_a_matrix_that_skips_a_step_takes_no_other_with_it(name, how, monkeypatch):
    """Nor does one whose gradient of zeros puts off its refresh, after which the others have reset their moments."""
    plain = model()
    expected = train(optimizer(name, plain, on_refresh=how), plain, range(STEPS), missing=UNEVEN)
    monkeypatch.setattr(step, "at_once", lambda device: True)
    params = model()
    opt = optimizer(name, params, on_refresh=how)
    same(expected, train(opt, params, range(STEPS), missing=UNEVEN), exact=False)
    assert int(opt.state[params[1]]["skipped"]) == 1
    assert int(opt.state[params[0]]["step"]) == STEPS - 1


@pytest.mark.parametrize("name", ["galore_i3s_adamw", "fira_adamw"])
@pytest.mark.parametrize("there", [True, False])
def test_checkpoints_go_from_stacks_to_matrices_and_back(name, there, monkeypatch, tmp_path):
    params = model()
    expected = train(optimizer(name, params), params, range(STEPS))
    monkeypatch.setattr(step, "at_once", lambda device: there)
    params = model()
    opt = optimizer(name, params)
    train(opt, params, range(7))
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    monkeypatch.setattr(step, "at_once", lambda device: not there)
    again = optimizer(name, params)
    again.load_state_dict(torch.load(tmp_path / "state.pt"))
    same(expected, train(again, params, range(7, STEPS)), exact=False)
    for p in params:
        assert {k: v.shape for k, v in again.state[p].items()} == {k: v.shape for k, v in opt.state[p].items()}


def test_a_matrix_that_leaves_a_stack_keeps_no_memory_of_the_others(at_once):
    params = model(shapes=[(6, 11), (6, 11), (4,)])
    opt = optimizer("galore_i3s_adamw", params)
    train(opt, params, range(2))
    shared = opt.state[params[1]]["exp_avg"]
    assert shared.untyped_storage().nbytes() == 2 * shared.nbytes
    params[0].requires_grad_(False)
    opt.forget(params[:1])
    before = {key: tensor.clone() for key, tensor in opt.state[params[1]].items()}
    opt._prepared()
    after = opt.state[params[1]]
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items()) and before.keys() == after.keys()
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in after.values())
    train(opt, params, range(2, 4), missing={(t, 0): "none" for t in range(2, 4)})


def test_a_state_that_is_put_in_the_place_of_a_stacked_one_is_the_one_that_is_used(at_once):
    ends = []
    for exchanged in (False, True):
        params = model()
        opt = optimizer("galore_i3s_adamw", params)
        train(opt, params, range(3))
        if exchanged:
            opt.state[params[0]].update({key: value.clone() for key, value in opt.state[params[0]].items()})
            opt.state[params[1]]["exp_avg"] = torch.zeros_like(opt.state[params[1]]["exp_avg"])
        else:
            opt.state[params[1]]["exp_avg"].zero_()
        ends.append(train(opt, params, range(3, STEPS)))
    same(*ends, exact=True)


def test_rows_whose_parts_look_at_every_element_of_the_gradient_are_not_stacked(at_once):
    params = model()
    for name in (name for name in COVERING if name not in STACKED):
        opt = optimizer(name, params)
        train(opt, params, range(2))
        assert opt._work.stacks == []
    assert stacks.stacked([]) == []


@pytest.mark.parametrize("name", ["galore_i3s_adamw", "apollo_random_adamw", "galore_i3s_adamw_layerwise"])
@pytest.mark.parametrize("accelerated", [True, False])
def test_refreshes_are_spread_by_default_where_somebody_would_wait_for_them(name, accelerated, monkeypatch):
    monkeypatch.setattr(step, "at_once", lambda device: accelerated)
    params = model()
    groups = [{"params": params[:-1], "rank": 3, "update_proj_gap": 50}, {"params": params[-1:]}]
    opt = LowRankOptimizer(groups, name)
    train(opt, params, range(1))
    due = [int(opt.state[p]["refresh_at"]) for p in params[:-1]]
    spread = "layerwise" in name or (accelerated and "apollo" not in name)  # a sketch is drawn in no time
    assert (len(set(due)) > 4) == spread


@pytest.mark.parametrize("name", ["galore_i3s_adamw", "galore_i3s_msgd", "subtrack_adamw"])
def test_gradients_are_clipped_before_they_step_as_one(name, monkeypatch):
    """By the norm of the projected ones; none is read twice, or left over for the next step."""
    norm = 0.5  # every gradient is several times larger
    plain = model()
    expected = train(optimizer(name, plain, max_grad_norm=norm), plain, range(STEPS))
    unclipped = model()
    free = train(optimizer(name, unclipped), unclipped, range(STEPS))
    monkeypatch.setattr(step, "at_once", lambda device: True)
    params = model()
    opt = optimizer(name, params, max_grad_norm=norm)
    for t in range(STEPS):
        train(opt, params, [t])
        assert all(unit.started is None for unit in opt._work.units)
    same(expected, [p.detach() for p in params], exact=False)
    assert not torch.allclose(free[0], expected[0], rtol=1e-3)


@pytest.mark.parametrize("name", ["natural_galore_adamw", "galore_dominant_came"])
def test_every_matrix_counts_for_itself(name, at_once):
    params = model()
    opt = optimizer(name, params)
    train(opt, params, range(STEPS), missing=UNEVEN)
    again = model()
    other = optimizer(name, again)
    for i in range(len(params)):  # alone, each in its turn
        for t in range(STEPS):
            for p in again:
                p.grad = None
            what = UNEVEN.get((t, i), "good")
            if what != "none":
                again[i].grad = stream(again[i].shape, i)[t].clone()
                if what == "bad":
                    again[i].grad.view(-1)[0] = torch.nan
                if what == "zeros":
                    again[i].grad.zero_()
            other.step()
    same([p.detach() for p in params], [p.detach() for p in again], exact=False)


@pytest.mark.parametrize("name", ["galore_dominant_adamw_layerwise", "fira_adamw_layerwise", "frugal_adamw_layerwise"])
def test_layerwise_skips_what_is_not_finite(name, at_once):
    """Also where a basis would be chosen from it, and decomposed, which raises."""
    params = model()
    opt = optimizer(name.removesuffix("_layerwise"), params, layerwise=True, update_proj_gap=1)
    opt.train()
    for bad in (True, False, True):
        for i, p in enumerate(params):
            G = stream(p.shape, i)[0]
            (p * (G * torch.nan if bad else G)).sum().backward()
        opt.step()
        opt.zero_grad()
    assert all(p.isfinite().all() for p in params)
    assert [int(opt.state[p]["skipped"]) for p in params[:-1]] == [2] * (len(params) - 1)


def test_a_wave_of_refreshes_holds_no_more_than_a_bucket(at_once):
    """Of rules that put a matrix of its size in the place of the gradient, not only of bases."""
    wide, counted = (64, 4096), {}
    for name in ("galore_dominant_adamw", "fira_adamw", "ldadam"):
        opt = LowRankOptimizer([{"params": [weight(wide)], "rank": 2}], name)
        opt.param_groups[0]["params"][0].grad = torch.ones(wide)
        opt.step()
        counted[name] = refresh.wave_size(opt._work.matrices)
    assert counted == {
        "galore_dominant_adamw": step.SYNC_ELEMENTS // 128,
        "fira_adamw": step.SYNC_ELEMENTS // 128,  # it reads the gradient, and puts nothing in its place
        "ldadam": step.SYNC_ELEMENTS // (64 * 4096),
    }


@pytest.mark.parametrize("products", ["bf16x2", "bf16", "tf32"])
@pytest.mark.parametrize("name, more", [("alice_adamw", {}), ("frugal_adamw", {"free": "column_norm"})])
def test_what_a_method_asks_not_to_be_rounded_is_rounded_in_no_stack(name, more, products, monkeypatch):
    """FRUGAL and Alice, on fp32 weights: rounding would be taken for what the subspace leaves out."""
    ends = []
    for accelerated in (False, True):
        monkeypatch.setattr(step, "at_once", lambda device, accelerated=accelerated: accelerated)
        params = model(shapes=[(6, 11)] * 3 + [(11, 6)] * 2 + [(4,)])
        opt = optimizer(name, params, products=products, **more)
        train(opt, params, range(6))
        ends.append([p.detach() for p in params])
    for alone, stacked in zip(*ends, strict=True):
        assert torch.allclose(alone, stacked, rtol=0, atol=1e-5 * float(alone.abs().max()))  # rounded: 1e-3
