"""Anything a user may combine: no crash, nothing that is not finite, orthonormal bases.

`make test-all` runs 10,000 cases.
"""

from __future__ import annotations

import pytest
import torch
from fitting import fitting
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import NAMES, weight

from hf_lowrank import LowRankOptimizer
from hf_lowrank.methods import resolve, table


QUANTISED = (70, 66)  # at rank 64 basis and moments have more than 4096 elements: 8-bit and 4-bit tensors are stored
SHAPES = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
    st.sampled_from([QUANTISED, QUANTISED[::-1], (2, 40, 33)]),
)
KINDS = ("normal", "tiny", "large", "zero", "nan", "inf", "rank one", "one entry", "zero slice", "enormous", "none")


def gradient(shape, kind, seed, dtype):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "none":
        return None
    if kind == "tiny":
        G *= 1e-6 if dtype == torch.float16 else 1e-15  # fp16 holds a few bits of it; fp32 its square
    elif kind == "large":
        G *= 1e3
    elif kind == "enormous":
        G *= 1e4 if dtype == torch.float16 else 1e17  # squares add up to less than the largest number
    elif kind == "zero":
        G.zero_()
    elif kind in ("nan", "inf"):
        G.view(-1)[seed % G.numel()] = float(kind)
    elif kind == "rank one":
        G = G[..., :1] * G[..., :1, :]
    elif kind == "one entry":
        entry = G.view(-1)[0].clone()
        G.zero_().view(-1)[seed % G.numel()] = entry
    elif kind == "zero slice":
        G[0] = 0
    return G.to(dtype)


def backward(opt, p, G):
    """Give p the gradient G through autograd, so that the hooks of the layerwise mode run."""
    opt.train()
    p.grad = None
    if G is not None:
        (p * G).sum().backward()


def train(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES), "method")
    parts = resolve.parts(name, {})
    shape = data.draw(SHAPES, "shape")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), "dtype")
    options = {
        "rank": data.draw(st.one_of(st.integers(1, 12), st.sampled_from([0.25, 0.5])), "rank"),
        "update_proj_gap": data.draw(st.integers(1, 4), "gap"),
        "proj_type": data.draw(st.sampled_from(["std", "paper", "reverse_std", "left", "right"]), "proj_type"),
        "on_refresh": data.draw(st.sampled_from(parts.moments.transports), "on_refresh"),
        "stagger": data.draw(st.booleans(), "stagger"),
        "correct_bias": data.draw(st.booleans(), "correct_bias"),
        "state_format": data.draw(st.sampled_from(["fp32", "8bit", "4bit"]), "state_format"),
        "basis_format": data.draw(st.sampled_from(["fp32", "bf16", "8bit", "4bit"]), "basis_format"),
        "layerwise": data.draw(st.booleans(), "layerwise"),
    }
    if parts.reconstruction.scales_residual:  # others are refused
        options["basis_format"] = "fp32"
    if 70 in shape:
        options["rank"] = 64
    for key, values in (
        ("refresh", ("gram", "svd", "randomized", "power")),
        ("fira_form", ("released", "i3s", "paper")),
        ("r0", (0, 1, 2, 20)),
        ("eps_place", ("torch", "released")),
    ):
        if key in resolve.complete(name, fitting(name, options)):
            value = data.draw(st.sampled_from(values), key)
            if key != "refresh" or value in ("gram", "svd") or table.METHODS[name].subspace in ("dominant", "lazy"):
                options[key] = value
    p, dense = weight(shape, dtype=dtype), weight((3,), dtype=dtype)
    groups = [{"params": [p], **fitting(name, options)}, {"params": [dense]}]
    opt = LowRankOptimizer(groups, name, lr=1e-2, weight_decay=0.1)
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=8), "gradients")
    seeds = range(len(kinds))
    stream = [gradient(shape, kind, seed, dtype) for kind, seed in zip(kinds, seeds, strict=True)]
    for t, G in enumerate(stream):
        backward(opt, p, G)
        dense.grad = gradient((3,), kinds[t], t, dtype) if kinds[t] not in ("rank one", "zero slice") else None
        opt.step()
        assert torch.isfinite(p).all() and torch.isfinite(dense).all()
        for key, value in opt.state.get(p, {}).items():
            assert torch.isfinite(value.float()).all(), key
            assert key != "exp_avg_sq" or (value >= 0).all()
        if "basis" in opt.state[p] and parts.subspace.orthonormal and options["basis_format"] == "fp32":
            P = opt.state[p]["basis"]
            assert (P.mT @ P - torch.eye(P.shape[-1])).abs().max() < 1e-5  # LAPACK's fp32 orthonormality
    bad = sum(kind in ("nan", "inf") for kind in kinds)
    assert int(opt.state[p]["skipped"]) == bad
    assert int(opt.state[p]["step"]) == len(kinds) - bad - kinds.count("none")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_combination_trains(data):
    train(data)


@pytest.mark.full
@settings(max_examples=10_000, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_combination_trains_at_length(data):
    train(data)
