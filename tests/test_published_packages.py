"""Parity with the released packages galore-torch 1.0 and fira 1.0.2, and what is wrong in them.

Both add eps to the uncorrected sqrt(V) and decay after the update: runs are compared without decay, and at eps 1e-12
or with eps_place=released.
"""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from streams import PLAIN, SQUARE, TALL, WIDE, displacement, finish, gradients, optimizer, run, weight

from hf_lowrank import METHODS, LowRankOptimizer


fira = pytest.importorskip("fira")
galore_torch = pytest.importorskip("galore_torch")
GradientProjector = pytest.importorskip("fira.gradient_projection").GradientProjector
GaLoreProjector = pytest.importorskip("galore_torch.galore_projector").GaLoreProjector

STEPS, GAP, SCALE, LR = 40, 10, 0.25, 1e-2
CASES = [(WIDE, 3), (TALL, 3), (SQUARE, 3), (WIDE, 6), (TALL, 6), (SQUARE, 7)]
# both sides in fp32, each with decompositions of its own: seen 3e-6; a wrong sign or a lost step is above 1e-1
ACROSS_REFRESHES = 1e-3
WITHIN_ONE_BASIS = 1e-4
RELEASED = {"project": "galore", "fira": "fira"}
SAME_MOMENTS = PLAIN


def official(p, kind, basis_of=None, *, rank, gap=GAP, scale=SCALE, proj_type="std", eps=1e-12, weight_decay=0.0):
    """The released optimizer; its projector is given before the first step if its basis is to be another."""
    group = {"params": [p], "rank": rank, "update_proj_gap": gap, "proj_type": proj_type}
    if kind == "galore":
        opt = galore_torch.GaLoreAdamW(
            [{**group, "scale": scale}], lr=LR, eps=eps, weight_decay=weight_decay, no_deprecation_warning=True
        )
        base, scaled = GaLoreProjector, {"scale": scale}
    else:
        opt = fira.FiraAdamW(
            [{**group, "alpha": scale}], lr=LR, eps=eps, weight_decay=weight_decay, no_deprecation_warning=True
        )
        base, scaled = GradientProjector, {"alpha": scale}
    if basis_of:

        class Projector(base):
            def get_orthogonal_matrix(self, weights, rank, type):
                own = super().get_orthogonal_matrix(weights, rank, type)  # (m, r), or (r, n) on the right
                return basis_of(own.T if type == "right" else own, self.ortho_matrix, type)

        opt.state[p]["projector"] = Projector(rank, update_proj_gap=gap, proj_type=proj_type, **scaled)
    return opt


def aligned(own, before, type):
    """Their own singular vectors with our signs: the papers leave them open, kept moments feel them."""
    if before is None:
        pivot = own.gather(0, own.abs().argmax(0, keepdim=True))
    else:
        pivot = (own * (before.T if type == "right" else before)).sum(0, keepdim=True)
    own = own * torch.where(pivot < 0, -1.0, 1.0)
    return own.T if type == "right" else own


def parity(name, shape, *, rank, steps=STEPS, gap=GAP, scale=SCALE, own=False, eps=1e-12, size=1.0, **options):
    """Distance of our run and the released package's, in units of the displacement."""
    stream, ours, theirs = gradients(shape, steps, drift=0.05), weight(shape), weight(shape)
    stream, start = [size * G for G in stream], ours.detach().clone()
    opt = optimizer(
        ours, name, rank=rank, update_proj_gap=gap, scale=scale, on_refresh="keep", lr=LR, eps=eps, **options
    )

    def injected(_, before, type):
        basis = opt.state[ours]["basis"].clone()
        return basis.T if type == "right" else basis

    kind = RELEASED[METHODS[name].reconstruction]
    proj_type = options.get("proj_type", "std")
    common = {"rank": rank, "gap": gap, "scale": scale, "proj_type": proj_type, "eps": eps}
    other = official(theirs, kind, aligned if own else injected, **common)
    for t in run(opt, ours, stream):
        theirs.grad = stream[t].clone()
        other.step()
    return displacement(ours, theirs, start)


@pytest.mark.parametrize("name", SAME_MOMENTS)
@pytest.mark.parametrize("shape, rank", CASES)
def test_runs_equal_the_released_package_in_the_same_bases(name, shape, rank):
    assert parity(name, shape, rank=rank) < ACROSS_REFRESHES
    assert parity(name, shape, rank=rank, steps=15, gap=100) < WITHIN_ONE_BASIS


@pytest.mark.parametrize("name", ["galore_dominant_adamw", "fira_adamw"])
@pytest.mark.parametrize("shape, rank", CASES)
@pytest.mark.parametrize("refresh", ["gram", "svd"])
def test_runs_equal_the_released_package_with_each_sides_own_bases(name, shape, rank, refresh):
    assert parity(name, shape, rank=rank, own=True, refresh=refresh) < ACROSS_REFRESHES


@pytest.mark.parametrize("name", ["galore_dominant_adamw", "fira_adamw"])
@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_within_one_basis_the_released_package_agrees_as_it_comes(name, shape):
    """Nothing is aligned here: with one basis the signs of its vectors cancel."""
    stream, ours, theirs = gradients(shape, 30, drift=0.05), weight(shape), weight(shape)
    start = ours.detach().clone()
    finish(optimizer(ours, name, update_proj_gap=100, scale=SCALE, lr=LR, eps=1e-12), ours, stream)
    kind = RELEASED[METHODS[name].reconstruction]
    finish(official(theirs, kind, rank=3, gap=100), theirs, stream)
    assert displacement(ours, theirs, start) < WITHIN_ONE_BASIS


@pytest.mark.parametrize("name", ["galore_dominant_adamw", "fira_adamw"])
@pytest.mark.parametrize("shape, rank", CASES)
def test_scale_one_agrees_too(name, shape, rank):
    # at r = m released Fira keeps (1 - alpha) G, as we do; with alpha = 1 none is left on either side but its rounding
    assert parity(name, shape, rank=rank, scale=1.0) < ACROSS_REFRESHES


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("own", [True, False])
def test_every_side_of_the_projection_agrees(shape, proj_type, own):
    assert parity("galore_dominant_adamw", shape, rank=3, own=own, proj_type=proj_type) < ACROSS_REFRESHES


@pytest.mark.parametrize("name", ["galore_dominant_adamw", "fira_adamw"])
@pytest.mark.parametrize("shape, rank", CASES)
# the packages' own eps beside gradients of the size of a language model's, some 1e-5; and one that is as large as they
@pytest.mark.parametrize("eps, size", [(1e-6, 1e-5), (0.1, 1.0)])
def test_with_eps_where_they_put_it_runs_equal_the_released_packages(name, shape, rank, eps, size):
    common = {"rank": rank, "own": True, "refresh": "svd", "eps": eps, "size": size}
    assert parity(name, shape, eps_place="released", **common) < 1e-5  # seen: 6e-7
    assert parity(name, shape, **common) > 1e-2  # where torch puts it they part


@pytest.mark.parametrize("kind, name", [("galore", "galore_dominant_adamw"), ("fira", "fira_adamw")])
@pytest.mark.parametrize("shape", [(9,), WIDE, TALL])
def test_so_do_dense_parameters(kind, name, shape):
    stream = [1e-5 * G.reshape(-1)[: weight(shape).numel()].reshape(shape) for G in gradients(WIDE, STEPS)]
    ends, groups = [], ({"eps_place": "released"}, {"eps_place": "torch"}, None)
    for group in groups:
        p = weight(shape)
        if group is None:
            made = galore_torch.GaLoreAdamW if kind == "galore" else fira.FiraAdamW
            opt = made([p], lr=LR, eps=1e-6, no_deprecation_warning=True)
        else:
            opt = LowRankOptimizer([{"params": [p], **group}], name, lr=LR, eps=1e-6)
        ends.append(finish(opt, p, stream))
    released, torchs, theirs = ends
    assert displacement(theirs, released, weight(shape)) < 1e-5  # the same sums of fp32 numbers
    assert displacement(theirs, torchs, weight(shape)) > 1e-2


def test_a_rank_above_the_short_side_is_clamped_as_released():
    stream, ours, theirs = gradients(TALL, STEPS), weight(TALL), weight(TALL)
    start = ours.detach().clone()
    finish(optimizer(ours, "galore_dominant_adamw", rank=50, update_proj_gap=GAP, lr=LR, eps=1e-12), ours, stream)
    finish(official(theirs, "galore", aligned, rank=50), theirs, stream)
    assert displacement(ours, theirs, start) < ACROSS_REFRESHES


# ---- what is wrong in the released packages -------------------------------------------------------------------------


@pytest.mark.parametrize("kind, name", [("galore", "galore_dominant_adamw"), ("fira", "fira_adamw")])
def test_released_packages_decay_the_fresh_update_too(kind, name):
    [G], ours, theirs = gradients(WIDE, 1), weight(WIDE), weight(WIDE)
    start, decay = ours.detach().double(), 1 - LR * 0.5
    still = weight(WIDE)
    update = start - finish(optimizer(still, name, lr=LR, eps=1e-12), still, [G]).double()
    finish(optimizer(ours, name, lr=LR, eps=1e-12, weight_decay=0.5), ours, [G])
    finish(official(theirs, kind, rank=3, weight_decay=0.5), theirs, [G])
    # one step: the update is 1e-3 .. 1e-2, decaying it changes some 1e-5; fp32 weights of 0.02 resolve 1e-9
    torch.testing.assert_close(ours.detach().double(), decay * start - update, rtol=0, atol=1e-7)
    torch.testing.assert_close(theirs.detach().double(), decay * (start - update), rtol=0, atol=1e-7)
    assert (ours - theirs).abs().max() > 3e-6


def test_released_packages_add_eps_to_the_uncorrected_second_moment():
    """At step 1 sqrt(V) is sqrt(1 - b2) |R|: eps acts sqrt(1 / (1 - b2)) = 31 times as strongly as AdamW's."""
    [G], sizes = gradients(WIDE, 1), []
    for make in (
        lambda p: optimizer(p, "galore_dominant_adamw", lr=LR, eps=0.1),
        lambda p: official(p, "galore", rank=3, eps=0.1),
    ):
        p = weight(WIDE)
        sizes.append((finish(make(p), p, [G]) - weight(WIDE).detach()).norm())
    assert sizes[1] < 0.75 * sizes[0]  # |R| is around 1 to 6: R / (R + 0.1) against R / (R + 3.2)


def test_released_galore_cannot_project_a_wide_matrix_at_full_rank_in_reverse():
    stream = gradients(WIDE, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        p = weight(WIDE)
        finish(official(p, "galore", rank=6, proj_type="reverse_std"), p, stream)
    ours, right = weight(WIDE), weight(WIDE)
    finish(optimizer(ours, "galore_dominant_adamw", rank=6, proj_type="reverse_std", lr=LR, eps=1e-12), ours, stream)
    finish(official(right, "galore", rank=6, proj_type="right"), right, stream)  # the same side, said otherwise
    assert displacement(ours, right, weight(WIDE)) < WITHIN_ONE_BASIS


@pytest.mark.parametrize("kind, name", [("galore", "galore_dominant_adamw"), ("fira", "fira_adamw")])
def test_released_state_cannot_be_loaded_safely_and_ours_can(kind, name):
    p = weight(WIDE)
    for opt, loads in ((official(p, kind, rank=3), False), (optimizer(p, name), True)):
        finish(opt, p, gradients(WIDE, 2))
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        if loads:
            torch.load(file, weights_only=True)
        else:
            with pytest.raises(pickle.UnpicklingError):
                torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind, name", [("galore", "galore_dominant_adamw"), ("fira", "fira_adamw")])
def test_released_moments_in_bf16_cannot_fall_and_ours_do(kind, name):
    """b2 = 0.999 rounds V back to itself in bf16 (a relative change of 1e-3 is under half a unit, 2^-9)."""
    [G] = gradients(WIDE, 1)
    stream = [G.bfloat16()] * 30 + [G.bfloat16() * 0.01] * 100
    for make, falls in ((lambda p: official(p, kind, rank=3), False), (lambda p: optimizer(p, name, eps=1e-12), True)):
        p = weight(WIDE, dtype=torch.bfloat16)
        opt = make(p)
        finish(opt, p, stream[:30])
        before = float(opt.state[p]["exp_avg_sq"].float().sum())
        finish(opt, p, stream[30:])
        after = float(opt.state[p]["exp_avg_sq"].float().sum())
        if falls:  # 0.999^100 = 0.905, and the small gradients add 1e-4 of what was
            assert after == pytest.approx(0.905 * before, rel=0.01)
        else:
            assert after >= before


@pytest.mark.parametrize("kind", ["zero", "within the subspace"])
def test_released_fira_locks_the_residual_after_a_first_one_of_nothing_and_ours_does_not(kind):
    """From zero the norm may grow to 1.01 (last + 1e-8) a step: after 40 steps it is at most 40 x 1e-8 x 1.01^40.

    A first residual that is rounding noise, 1e-7 of a gradient of order 1, is no better.
    """
    first = (
        torch.zeros(WIDE) if kind == "zero" else torch.outer(torch.linspace(0.3, 1.7, 6), torch.linspace(-1, 2.3, 11))
    )
    norms = []
    for make, key in (
        (lambda p: official(p, "fira", rank=3, scale=1.0), "scaling_grad"),
        (lambda p: optimizer(p, "fira_adamw", lr=LR, eps=1e-12, update_proj_gap=GAP, scale=1.0), "residual_norm"),
    ):
        p = weight(WIDE)
        opt = make(p)
        finish(opt, p, [first, *gradients(WIDE, 40)])
        norms.append(float(opt.state[p][key]))
    assert norms[0] < 1e-4 < 0.1 < norms[1]
