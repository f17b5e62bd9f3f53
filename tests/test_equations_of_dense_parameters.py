"""Parameters without a subspace, and weights of low precision, against the equations in float64."""

from __future__ import annotations

import pytest
import torch
from comparing import GAP, STEPS, TOLERANCE, references
from references.base import Adam, LowRank, adamw
from references.factored import CAME, Adafactor, AdamMini
from references.momentum import Momentum
from streams import COVERING, TALL, WIDE, displacement, finish, gradients, optimizer, orthonormal, weight

from hf_lowrank import LowRankOptimizer
from hf_lowrank.methods import resolve
from hf_lowrank.tensors import kernels


# ---- dense parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("name, moments", [
    ("galore_dominant_adafactor", Adafactor()),
    ("galore_dominant_came", CAME()),
    ("galore_dominant_adam_mini", AdamMini("column", outside=True)),  # one per row of the weight
    ("golore_msgd", Momentum(whole=True)),
    ("galore_i3s_msgd", Momentum()),
    ("flora_adafactor", Adafactor(late=True)),
    ("natural_galore_adamw", Adam()),
    ("foam_adamw", Adam()),
    ("galore_dominant_muon", Adam()),
])  # fmt: skip
def test_dense_matrices_take_the_same_moments_and_no_scale(shape, name, moments):
    p, start, stream = weight(shape), weight(shape), gradients(shape, STEPS)
    common = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}
    opt = LowRankOptimizer([{"params": [p]}], name, betas=(0.8, 0.95), **common)
    identity = {"rank": min(shape), "gap": 100, "choose": lambda G, r, old: torch.eye(*G.shape[:1], r).double()}
    ref = LowRank(
        start.detach().clone(), moments=moments, beta1=0.8, beta2=0.95, transposed=True, **identity, **common
    )
    ref.rank = shape[1]
    for G in stream:
        ref.step(G)
    assert displacement(ref.weight, finish(opt, p, stream), start) < TOLERANCE


@pytest.mark.parametrize("name, by_hand", [
    ("galore_dominant_adafactor", "adafactor"),
    ("flora_adafactor", "flora"),
    ("galore_dominant_came", "came"),
    ("galore_dominant_adam_mini", "adam"),
    ("galore_i3s_msgd", "momentum"),
    ("natural_galore_adamw", "adam"),
    ("foam_adamw", "adam"),
    ("galore_dominant_muon", "adam"),
])  # fmt: skip
def test_dense_vectors_are_stepped_by_the_element(name, by_hand):
    p, start, stream = weight((9,)), weight((9,)), [G[0] for G in gradients((5, 9), STEPS)]
    opt = LowRankOptimizer([{"params": [p]}], name, lr=1e-2, eps=1e-2, betas=(0.8, 0.95))
    finish(opt, p, stream)
    W, M, V = start.detach().double(), 0.0, 0.0
    for t, gradient in enumerate(stream, 1):
        G = gradient.double()
        b2 = 1 - t**-0.8 if by_hand in ("adafactor", "flora") else 0.95
        V = b2 * V + (1 - b2) * G * G
        if by_hand in ("adafactor", "flora", "came"):  # not factored, and no confidence
            G = G / V.sqrt()
            G = G if by_hand == "flora" else G / max(1.0, float(G.norm()) / 3)
        M = 0.8 * M + 0.2 * G
        N = {
            "adam": (M / (1 - 0.8**t)) / ((V / (1 - 0.95**t)).sqrt() + 1e-2),
            "flora": M / max(1.0, float(M.norm()) / 3),
        }
        W = W - 1e-2 * N.get(by_hand, M)
    assert displacement(W, p, start) < TOLERANCE


@pytest.mark.parametrize("place", ["torch", "released"])
@pytest.mark.parametrize("name", ["galore_dominant_adamw", "natural_galore_adamw", "foam_adamw", "fira_muon"])
def test_eps_has_its_place_in_dense_parameters_too(name, place):
    p, start, stream = weight(WIDE), weight(WIDE), gradients(WIDE, STEPS)
    opt = LowRankOptimizer([{"params": [p], "eps_place": place}], name, lr=1e-2, eps=1e-2)
    ref = LowRank(
        start.detach().clone(),
        rank=6,
        gap=100,
        choose=lambda G, r, old: torch.eye(r).double(),
        lr=1e-2,
        eps=1e-2,
        eps_place=place,
    )
    for G in stream:
        ref.step(G)
    assert displacement(ref.weight, finish(opt, p, stream), start) < TOLERANCE


@pytest.mark.parametrize("name", COVERING)
def test_steps_are_counted_apart_where_eps_depends_on_them(name):
    """A vector that misses a gradient is at another t than the one beside it; both are stepped in one call."""
    if "eps_place" not in resolve.complete(name, {}, low_rank=False):
        pytest.skip("has no eps")
    stream, ends = [G[0] for G in gradients((5, 9), 6)], []
    for together in (True, False):
        a, b = weight((9,)), weight((9,), seed=8)
        opts = [
            LowRankOptimizer([{"params": some, "eps_place": "released"}], name, lr=1e-2, eps=1e-2)
            for some in ([[a, b]] if together else [[a], [b]])
        ]
        for t, G in enumerate(stream):
            a.grad, b.grad = G.clone(), None if t < 3 else G.clone()
            for opt in opts:
                opt.step()
        ends.append(torch.cat([a.detach(), b.detach()]))
    assert torch.equal(*ends)


def test_dense_parameters_without_bias_correction_follow_eq_1_too():
    p = weight(WIDE)
    stream = gradients(WIDE, STEPS)
    opt = optimizer(p, "galore_dominant_adamw", rank=None, correct_bias=False, lr=1e-2, eps=1e-2)
    start, M, V, W = p.detach().clone(), 0.0, 0.0, p.detach().double()
    finish(opt, p, stream)
    for gradient in stream:
        G = gradient.double()
        M, V = 0.9 * M + 0.1 * G, 0.999 * V + 0.001 * G * G
        W = W - 1e-2 * M / (V.sqrt() + 1e-2)
    assert displacement(W, p, start) < TOLERANCE


# ---- weights of low precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [3, None])
def test_a_low_precision_weight_gets_the_exact_update_then_one_rounding(name, dtype, rank):
    """The reference is set back to the rounded weight before every step, so that one step is compared at a time."""
    stream, p = [G.to(dtype) for G in gradients(WIDE, STEPS)], weight(WIDE, dtype=dtype)
    opt = optimizer(p, name, rank=rank, weight_decay=0.1, lr=1e-2, **({"update_proj_gap": GAP} if rank else {}))
    twin = optimizer(exact := torch.nn.Parameter(p.detach().float()), name, rank=rank, weight_decay=0.1, lr=1e-2,
                     **({"update_proj_gap": GAP} if rank else {}))  # fmt: skip
    for G in stream:
        exact.data.copy_(p.detach())
        p.grad, exact.grad = G.clone(), G.float()
        opt.step()
        twin.step()
        _, exponent = torch.frexp(exact.detach())
        step = torch.ldexp(torch.ones_like(exact), (exponent - (8 if dtype == torch.bfloat16 else 11)).clamp_min(-24))
        # one unit in the last place at most; the fp32 images may differ by the order of additions
        assert ((p.detach().float() - exact.detach()).abs() <= step * 1.001).all()
    for key in {"exp_avg", "exp_avg_sq"} & set(opt.state[p]):  # moments never see the rounding, and stay fp32
        assert opt.state[p][key].dtype == torch.float32
        torch.testing.assert_close(opt.state[p][key], twin.state[exact][key], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["galore_dominant_adamw", "fira_adamw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [3, None])
def test_runs_of_low_precision_weights_equal_the_reference_in_the_mean(name, dtype, rank):
    copies, steps = 300, 6
    stream = [G.to(dtype) for G in gradients(WIDE, steps)]
    ps = [weight(WIDE, dtype=dtype) for _ in range(copies)]
    opt = optimizer(ps, name, rank=rank, lr=1e-2, weight_decay=0.1, **({"update_proj_gap": 3} if rank else {}))
    if rank:
        ref = references(ps[0], opt)[0]
        for G in stream:
            ref.step(G)
        exact = ref.weight
    else:
        exact = adamw(ps[0].detach(), stream, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, wd=0.1)
    for G in stream:
        for p in ps:
            p.grad = G.clone()
        opt.step()
    runs = torch.stack([p.detach().double() for p in ps])
    z = (runs.mean(0) - exact) / (runs.std(0) / copies**0.5)
    # z^2 of the 66 entries has mean 1 and a standard error of 0.17 for unbiased rounding: five of those
    assert z.square().mean() < 1.9
    assert runs.std(0).min() > 0  # and each copy rounds by a stream of its own


def test_weights_larger_than_one_block_are_written_like_small_ones():
    shape = (16, 70000)
    assert shape[0] * shape[1] > kernels.BLOCK
    gen = torch.Generator().manual_seed(0)
    G = (
        orthonormal(16, 16, gen) * torch.arange(16, 0, -1) @ torch.randn(16, 70000, generator=gen).double()
    ).bfloat16()
    for name, rank in (("fira_adamw", 4), ("fira_adamw", None)):
        got = []
        for dtype in (torch.bfloat16, torch.float32):
            p = torch.nn.Parameter((0.02 * torch.ones(shape)).bfloat16().to(dtype))
            opt = optimizer(p, name, rank=rank, stochastic_rounding=False)
            got.append(finish(opt, p, [G]))
        # the images may differ in the last fp32 bit, which turns a rounding to nearest in about 2^-15 of the cases
        assert (got[0] != got[1].bfloat16()).float().mean() < 1e-3
