"""Parity with the released packages apollo-torch, adam-mini and came-pytorch."""

from __future__ import annotations

import pytest
import torch
from comparing import STEPS, TOLERANCE, optimizer
from streams import SQUARE, TALL, WIDE, displacement, finish, gradients, weight


# ---- published packages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("scaling, scale", [("channel", 1.0), ("tensor", 128.0)])
@pytest.mark.parametrize("limit", ["back", "front"])
def test_apollo_is_apollo_torchs(shape, scaling, scale, limit):
    apollo_torch = pytest.importorskip("apollo_torch")
    stream = gradients(shape, STEPS)
    stream[7] = 50 * stream[7]  # the limiter acts
    p, q = weight(shape), torch.nn.Parameter(weight(shape).detach().double())
    group = {"params": [q], "rank": 3, "update_proj_gap": STEPS, "scale": scale, "proj": "svd", "proj_type": "std"}
    theirs = apollo_torch.APOLLOAdamW(
        [{**group, "scale_type": scaling}], lr=1e-2, eps=0.0, scale_front=limit == "back"
    )
    # one basis, since their signs jump at a refresh; no eps, since theirs is added before the bias correction; no
    # decay, since theirs shrinks the fresh update too
    options = {"scaling": scaling, "scale": scale, "limit": limit, "eps": 1e-30, "weight_decay": 0.0}
    options["update_proj_gap"] = STEPS
    finish(optimizer(p, "apollo_dominant_adamw", **options, betas=(0.9, 0.999)), p, stream)
    start = weight(shape)
    assert displacement(finish(theirs, q, stream), p, start) < TOLERANCE


@pytest.mark.parametrize("shape, called", [(WIDE, "mlp"), (TALL, "mlp"), (SQUARE, "mlp"), ((12, 6), "q_proj")])
def test_adam_mini_on_an_identity_basis_is_adam_minis(shape, called):
    """All rows of Grass's top rule in their order are an identity basis."""
    adam_mini = pytest.importorskip("adam_mini")
    stream, p, q = gradients(shape, STEPS), weight(shape), torch.nn.Parameter(weight(shape).detach().double())
    heads = {"dim": 2 * shape[1], "n_heads": 2 * shape[1]} if called == "q_proj" else {}  # blocks of two rows
    options = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}
    theirs = adam_mini.Adam_mini([(called, q)], betas=(0.8, 0.95), verbose=False, **options, **heads)
    parts = {"subspace": "rows", "moments": "adam_mini", "rows": "top", "on_refresh": "keep"}
    ours = optimizer(p, "lowrank", called=f"{called}.weight", rank=min(shape), **parts, scale=1.0, head_dim=2)
    finish(ours, p, stream)
    assert displacement(finish(theirs, q, stream), p, weight(shape)) < TOLERANCE


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_came_on_an_identity_basis_is_came_pytorchs(shape):
    came_pytorch = pytest.importorskip("came_pytorch")
    stream, p, q = gradients(shape, STEPS), weight(shape), torch.nn.Parameter(weight(shape).detach().double())
    theirs = came_pytorch.CAME([q], lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95, 0.9999))
    parts = {"subspace": "rows", "moments": "came", "rows": "top", "on_refresh": "keep"}
    finish(optimizer(p, "lowrank", rank=min(shape), **parts, scale=1.0), p, stream)
    assert displacement(finish(theirs, q, stream), p, weight(shape)) < TOLERANCE
