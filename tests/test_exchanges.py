"""What others put in the place of groups, parameters and state: an optimizer follows what it holds."""

from __future__ import annotations

import pytest
import torch
from fitting import fitting
from torch import nn

from hf_lowrank import METHODS, LowRankOptimizer


NAME = "galore_i3s_adamw"


def parameters(count=3):
    gen = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=gen)) for shape in ((8, 12), (12, 8), (5,))[:count]]


def optimizer_of(params, name=NAME, **options):
    return LowRankOptimizer([{"params": params[:2], "rank": 2, **options}, {"params": params[2:]}], name, lr=1e-2)


def steps(optimizer, params, seeds):
    for seed in seeds:
        gen = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=gen).to(p)
        optimizer.step()


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("how", ["tensors", "dicts", "state"])
@pytest.mark.parametrize("name", [NAME, f"{NAME}_8bit", f"{NAME}_layerwise"])
def test_state_that_was_moved_away_and_back_is_the_state(how, name):
    """As where state waits on the CPU while a policy generates: new tensors under the same keys."""
    mine, theirs = parameters(), parameters()
    moved, plain = optimizer_of(mine, name), optimizer_of(theirs, name)
    for optimizer, params in ((moved, mine), (plain, theirs)):
        optimizer.train()
        steps(optimizer, params, range(3))
    if how == "tensors":
        for state in moved.state.values():
            state.update({key: value.clone() for key, value in state.items()})
    elif how == "dicts":
        moved.state.update({p: {k: v.clone() for k, v in state.items()} for p, state in moved.state.items()})
    else:
        moved.state = type(moved.state)(dict, {p: dict(state) for p, state in moved.state.items()})
    steps(moved, mine, range(3, 6))
    steps(plain, theirs, range(3, 6))
    assert same(mine, theirs)
    for p, q in zip(mine, theirs, strict=True):
        assert all(torch.equal(moved.state[p][key], plain.state[q][key]) for key in plain.state[q])


def test_groups_in_another_order_keep_what_they_are():
    mine, theirs = parameters(), parameters()
    turned, plain = optimizer_of(mine, stochastic_rounding=False), optimizer_of(theirs, stochastic_rounding=False)
    steps(turned, mine, range(2))
    steps(plain, theirs, range(2))
    turned.param_groups.reverse()
    steps(turned, mine, range(2, 4))
    steps(plain, theirs, range(2, 4))
    assert same(mine, theirs) and [config.low_rank for config in turned.configs] == [False, True]


def test_a_parameter_that_takes_the_place_of_another_is_stepped():
    params = parameters()
    optimizer = optimizer_of(params)
    steps(optimizer, params, range(2))
    new = nn.Parameter(torch.ones(9, 7))
    optimizer.param_groups[0]["params"][0] = new
    before = params[0].detach().clone()
    steps(optimizer, [new, *params], range(2))
    assert int(optimizer.state[new]["step"]) == 2 and torch.equal(params[0], before)


def test_parameters_that_were_added_to_a_group_or_taken_out_are_followed():
    params = parameters()
    optimizer = optimizer_of(params)
    steps(optimizer, params, range(2))
    out, new = optimizer.param_groups[0]["params"].pop(), nn.Parameter(torch.ones(6))
    optimizer.param_groups[1]["params"].append(new)
    before = out.detach().clone()
    steps(optimizer, [new, *params], range(2))
    assert int(optimizer.state[new]["step"]) == 2 and torch.equal(out, before)


def test_a_parameter_that_cannot_be_trained_is_refused_there_too():
    params = parameters()
    optimizer = optimizer_of(params)
    optimizer.param_groups[1]["params"].append(nn.Parameter(torch.ones(3, dtype=torch.float64)))
    with pytest.raises(ValueError, match="float64; train it in float32"):
        optimizer.step()


@pytest.mark.parametrize("name", METHODS)
def test_the_default_dtype_changes_nothing(name):
    """torch.set_default_dtype(bfloat16) is how some scripts build a model; what is drawn and kept stays fp32."""
    options = fitting(name, {"rank": 4, "update_proj_gap": 2})
    finals = []
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters()
        torch.set_default_dtype(dtype)
        try:
            optimizer = optimizer_of(params, name, **options)
            for p in params:
                p.grad = torch.ones_like(p)
            for t in range(4):
                for p in params:
                    p.grad = torch.cos(torch.arange(p.numel(), dtype=torch.float32) * (t + 1)).view(p.shape)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        finals.append(params)
    assert same(*finals)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
@pytest.mark.parametrize("name", METHODS)
def test_a_parameter_without_elements_does_not_spoil_a_checkpoint(name, shape):
    p = nn.Parameter(torch.zeros(shape))
    optimizer = LowRankOptimizer([{"params": [p]}], name)
    p.grad = torch.zeros(shape)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(value.float().isfinite().all() for value in optimizer.state[p].values())
