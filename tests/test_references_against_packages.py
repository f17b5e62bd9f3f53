"""The float64 references against published packages, in the bases that those draw. All run in float64 on the CPU; some
decompose in float32, but the reference takes over what they drew.

Only what the package and the paper agree on is compared: weight decay 0 where a package decays the fresh update too,
epsilon 0 where it adds it to the uncorrected second moment, a constant learning rate where it lies inside a momentum.
"""

from __future__ import annotations

import pytest
import torch
from references.base import LowRank
from references.factored import CAME, Adafactor, AdamMini
from references.scaled import Apollo
from references.sketch import FLora
from references.streams import SHAPES, randn, same, stream
from references.twosided import TwoSided


LR, STEPS, GAP = 1e-2, 12, 5


def together(ref, parameter, optimizer, gradients):
    """Step both through the gradients, theirs first, so that the reference can take over their draw."""
    for G in gradients:
        parameter.grad = G.clone()
        optimizer.step()
        ref.step(G)
        same(ref.weight, parameter.detach())


def borrowed(optimizer, parameter):
    """The projector's matrix as (m, r)."""

    def choose(G, r, old):
        P = optimizer.state[parameter]["projector"].ortho_matrix
        return P if P.shape == (G.shape[0], r) else P.T

    return choose


def identity(G, r, old):
    return torch.eye(G.shape[0], dtype=torch.float64)


# ---- apollo-torch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("proj", ["random", "svd"])
@pytest.mark.parametrize("rank, by, scale", [(3, "channel", 1.0), (1, "tensor", 128.0), (2, "tensor", 4.0)])
@pytest.mark.parametrize("front", [False, True])
def test_apollo_is_apollo_torchs(shape, proj, rank, by, scale, front):
    apollo_torch = pytest.importorskip("apollo_torch")
    p = torch.nn.Parameter(randn(*shape))
    group = {"params": [p], "rank": rank, "update_proj_gap": GAP, "scale": scale, "proj": proj, "proj_type": "std"}
    optimizer = apollo_torch.APOLLOAdamW([{**group, "scale_type": by}], lr=LR, eps=0.0, scale_front=front)
    options = {"rank": rank, "gap": GAP, "by": by, "scale": scale, "scale_front": front, "lr": LR, "eps": 0.0}
    ref = Apollo(p.detach().clone(), choose=borrowed(optimizer, p), **options)
    gradients = stream(shape, STEPS)
    gradients[7] = 50 * gradients[7]  # the limiter acts
    together(ref, p, optimizer, gradients)
    assert {True, False} <= set(ref.limited)


# ---- adam-mini ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, name", [*((s, "mlp") for s in SHAPES), ((12, 6), "q_proj"), ((8, 8), "k_proj")])
def test_adam_mini_on_an_identity_basis_is_adam_minis(shape, name):
    """Output neurons are rows of the weight: rows of a wide one, columns of the wide view of the others."""
    adam_mini = pytest.importorskip("adam_mini")
    p, (rows, columns) = torch.nn.Parameter(randn(*shape)), shape
    by = "column" if rows >= columns else "row"
    heads = {}
    if name.endswith("proj"):  # it reckons with heads of dim^2 / n_heads numbers: here two rows
        by, heads = 2, {"dim": 2 * columns, "n_heads": 2 * columns}
    options = {"lr": LR, "eps": 1e-2, "weight_decay": 0.1}
    optimizer = adam_mini.Adam_mini([(name, p)], betas=(0.8, 0.95), verbose=False, **options, **heads)
    options |= {"rank": min(shape), "choose": identity, "beta1": 0.8, "beta2": 0.95}
    together(LowRank(p.detach().clone(), moments=AdamMini(by), **options), p, optimizer, stream(shape, STEPS))


# ---- CAME, Adafactor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_came_on_an_identity_basis_is_came_pytorchs(shape):
    came_pytorch = pytest.importorskip("came_pytorch")
    p = torch.nn.Parameter(randn(*shape))
    optimizer = came_pytorch.CAME([p], lr=LR, weight_decay=0.1, betas=(0.8, 0.95, 0.99))
    options = {"beta1": 0.8, "beta2": 0.95, "lr": LR, "weight_decay": 0.1}
    ref = LowRank(p.detach().clone(), rank=min(shape), choose=identity, moments=CAME(0.99), **options)
    together(ref, p, optimizer, stream(shape, STEPS))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta1", [0.9, None])
def test_adafactor_in_a_subspace_is_galore_torchs(shape, beta1):
    galore_torch = pytest.importorskip("galore_torch")
    p = torch.nn.Parameter(randn(*shape))
    group = {"params": [p], "rank": 3, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    fixed = {"lr": LR, "scale_parameter": False, "relative_step": False, "warmup_init": False}
    optimizer = galore_torch.GaLoreAdafactor([group], beta1=beta1, weight_decay=0.1, **fixed)
    ref = LowRank(
        p.detach().clone(),
        rank=3,
        gap=GAP,
        choose=borrowed(optimizer, p),
        moments=Adafactor(),
        beta1=beta1 or 0.0,
        scale=0.25,
        lr=LR,
        weight_decay=0.1,
    )
    together(ref, p, optimizer, stream(shape, STEPS))


# ---- two sides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_two_sides_are_galore_torchs(shape):
    galore_torch = pytest.importorskip("galore_torch")
    p = torch.nn.Parameter(randn(*shape))
    group = {"params": [p], "rank": 3, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "full"}
    optimizer = galore_torch.GaLoreAdamW([group], lr=LR, eps=0.0, no_deprecation_warning=True)

    def side(i):
        return lambda G, r, old: (lambda A, B: (A, B.T))(*optimizer.state[p]["projector"].ortho_matrix)[i]

    options = {"rank": 3, "gap": GAP, "scale": 0.25, "lr": LR, "eps": 0.0, "transposed": False}
    ref = TwoSided(p.detach().clone(), choose=side(0), choose_right=side(1), **options)
    together(ref, p, optimizer, stream(shape, STEPS))


# ---- flora-opt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_flora_is_flora_opts(shape):
    flora = pytest.importorskip("flora_opt.optimizers.torch.flora")
    p = torch.nn.Parameter(randn(*shape))
    fixed = {"scale_parameter": False, "relative_step": False, "weight_decay": 0.1, "lr": LR}
    optimizer = flora.Flora([p], rank=3, kappa=GAP, beta1=0.9, **fixed)
    tall = shape[0] >= shape[1]

    def sketch(k):
        seed = 1
        for _ in range(k):
            seed = flora.next_seed(seed)
        size = (shape[1], 3) if tall else (3, shape[0])
        A = flora.stable_randn(size, seed=flora.split_seed(seed)[int(tall)], dtype=torch.float64) / 3**0.5
        return A.T if tall else A

    ref = FLora(p.detach().clone(), gap=GAP, sketch=sketch, lr=LR, weight_decay=0.1)
    together(ref, p, optimizer, stream(shape, STEPS))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_not_sketched_is_stepped_as_flora_opt_does(shape):
    flora = pytest.importorskip("flora_opt.optimizers.torch.flora")
    p = torch.nn.Parameter(randn(*shape))
    fixed = {"scale_parameter": False, "relative_step": False, "weight_decay": 0.1, "lr": LR}
    optimizer = flora.Flora([p], rank=None, beta1=0.9, **fixed)
    moments = Adafactor(late=True)
    ref = LowRank(
        p.detach().clone(), rank=min(shape), choose=identity, moments=moments, beta1=0.9, lr=LR, weight_decay=0.1
    )
    together(ref, p, optimizer, stream(shape, STEPS))
