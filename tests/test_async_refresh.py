"""Bases that are chosen beside the steps, and adopted some steps later."""

from __future__ import annotations

import copy
import io
import re
import threading
from typing import Any

import pytest
import torch
from streams import STACK, WIDE, gradients, names_covering, optimizer, weight
from torch import Tensor

from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.engine import ahead
from hf_lowrank.methods import registry, resolve
from hf_lowrank.methods.moments.adam import Adam
from hf_lowrank.methods.subspaces.decomposed import Decomposed
from hf_lowrank.tensors import kernels, products


GAP, WAIT, STEPS = 5, 2, 17
RULES = {key for key, rule in registry.classes("subspace").items() if issubclass(rule, Decomposed)}
NAMES = [name for name in names_covering(("subspace",)) if METHODS[name].subspace in RULES]


def made(name: str, p: Tensor, **options: Any) -> LowRankOptimizer:
    usual = {"rank": 3, "update_proj_gap": GAP, "async_refresh": WAIT}
    return optimizer(p, name, **(usual | options))


def steps_(opt: LowRankOptimizer, p: Tensor, grads: list[Tensor]) -> None:
    for G in grads:
        p.grad = G.clone().to(p.dtype)
        opt.step()


def test_there_are_rows_of_every_rule_that_decomposes():
    assert {METHODS[name].subspace for name in NAMES} == RULES >= {"dominant", "i3s", "golore"}


def test_its_thread_leaves_torchs_flags_alone(monkeypatch):
    """They are the process's: what one thread set back another could have left."""
    flags, choose_, seen = torch.backends.cuda.matmul, ahead.Refresh.choose_, []
    name = "fp32_precision" if hasattr(flags, "fp32_precision") else "allow_tf32"
    before = getattr(flags, name)

    def looking(refresh: Any, *, finite: bool) -> None:
        with products.precision("tf32"):
            seen.append((threading.current_thread() is threading.main_thread(), getattr(flags, name) == before))
        choose_(refresh, finite=finite)

    monkeypatch.setattr(ahead.Refresh, "choose_", looking)
    p = weight(WIDE)
    steps_(made("galore_dominant_adamw", p), p, gradients(WIDE, GAP + WAIT))
    assert seen == [(True, False), (False, True)]  # the first basis is waited for, in the thread of the steps


def test_a_run_equals_the_equations():
    """Adam in a basis that is found at step t, and used from t + WAIT on; in float64."""
    grads, p = gradients(WIDE, STEPS), weight(WIDE)
    W = p.detach().double().clone()
    steps_(made("galore_dominant_adamw", p), p, grads)
    M, V, P, coming = torch.zeros(3, WIDE[1]), torch.zeros(3, WIDE[1]), torch.empty(0), torch.empty(0)
    for t, G in enumerate(g.double() for g in grads):
        if t % GAP == 0:
            coming = torch.linalg.svd(G)[0][:, :3]
        if t == 0:
            P = coming * coming.gather(0, coming.abs().argmax(0, keepdim=True)).sign()
        elif t % GAP == WAIT:
            P = coming * (coming * P).sum(0).sign()
        R = P.T @ G
        M, V = 0.9 * M + 0.1 * R, 0.999 * V + 0.001 * R.square()
        N = M / (1 - 0.9 ** (t + 1)) / ((V / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        W -= 1e-2 * 0.25 * P @ N
    moved = (W - weight(WIDE).detach().double()).norm()
    # fp32 against float64 over 17 steps of Adam; a basis one step late or early is at 1e-2 and more
    assert (p.detach().double() - W).norm() / moved < 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [WIDE, STACK])
def test_the_basis_is_that_of_a_run_that_waits_some_steps_later(name, shape):
    """The gradients do not depend on the weights here, so both runs see the same ones."""
    grads, p, q = gradients(shape, STEPS), weight(shape), weight(shape)
    late, usual = made(name, p), made(name, q, async_refresh=0)
    history = []
    for t, G in enumerate(grads):
        steps_(usual, q, [G])
        steps_(late, p, [G])
        history.append(usual.state[q]["basis"].clone())
        # what is in use after step t is what the next one projects onto
        began = max(start for start in range(0, t + 1, GAP) if start == 0 or start + WAIT <= t + 1)
        assert torch.equal(late.state[p]["basis"], history[began]), t
    assert int(late.state[p]["refreshes"]) == int(usual.state[q]["refreshes"])


@pytest.mark.parametrize("stop", range(1, STEPS))
@pytest.mark.parametrize(
    "options", [{}, {"basis_format": "4bit", "state_format": "8bit", "rank": 8}], ids=["fp32", "codes"]
)
def test_it_resumes_to_the_bit_wherever_it_is_stopped(stop, options):
    shape = (64, 96)
    grads, p, q = gradients(shape, STEPS), weight(shape), weight(shape)
    steps_(made("galore_i3s_adamw", p, **options), p, grads)
    first = made("galore_i3s_adamw", q, **options)
    steps_(first, q, grads[:stop])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = made("galore_i3s_adamw", q, **options)
    resumed.load_state_dict(torch.load(file))
    steps_(resumed, q, grads[stop:])
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_resumes_with_a_basis_on_its_way(name):
    grads, p, q = gradients(WIDE, STEPS), weight(WIDE), weight(WIDE)
    steps_(made(name, p), p, grads)
    first = made(name, q)
    steps_(first, q, grads[: GAP + 1])
    assert int(first.state_dict()["state"][0]["adopt_at"]) == GAP + WAIT
    second = copy.deepcopy(first)  # the copy has what the state says
    resumed = made(name, q)
    resumed.load_state_dict(first.state_dict())
    steps_(resumed, q, grads[GAP + 1 :])
    assert torch.equal(p, q)
    assert second.state_dict()["state"][0]["next_basis"].abs().sum() > 0


def test_a_checkpoint_waits_for_what_goes_on(monkeypatch):
    grads, p = gradients(WIDE, STEPS), weight(WIDE)
    opt, go, choose = made("galore_dominant_adamw", p), threading.Event(), ahead._choose
    monkeypatch.setattr(ahead, "_choose", lambda *job: go.wait() and choose(*job))
    steps_(opt, p, grads[: GAP + 1])
    threading.Timer(0.2, go.set).start()
    P = torch.linalg.svd(grads[GAP].double())[0][:, :3].float()
    found = opt.state_dict()["state"][0]["next_basis"]
    # up to signs; fp32 vectors against those of a full SVD
    assert ((P * found).sum(0).abs() - 1).abs().max() < 1e-5


def test_the_state_that_is_declared_has_room_for_one_more_basis():
    p, q = weight(WIDE), weight(WIDE)
    with_it, without = (
        opt.declared_bytes() for opt in (made("galore_i3s_adamw", p), made("galore_i3s_adamw", q, async_refresh=0))
    )
    assert with_it - without == 4 * WIDE[0] * 3 + 4 * 4 + 8


def test_what_is_chosen_does_not_depend_on_how_long_it_takes(monkeypatch):
    """A refresh that ends at the last moment, and one whose gradient is overwritten in the meantime."""
    grads, p, q = gradients(WIDE, STEPS), weight(WIDE), weight(WIDE)
    steps_(made("galore_i3s_adamw", p), p, grads)
    slow, begun = made("galore_i3s_adamw", q), []
    choose = ahead._choose
    monkeypatch.setattr(ahead, "_choose", lambda *job: begun.append(job))
    wait = ahead.Ahead._wait

    def late(self, weights):
        wait(self, weights)  # until the thread has handed them over
        for job in begun:
            choose(*job)
        begun.clear()

    monkeypatch.setattr(ahead.Ahead, "_wait", late)
    q.grad = torch.zeros_like(q)
    for G in grads:
        q.grad.copy_(G)
        slow.step()
        q.grad.fill_(torch.nan)
    assert torch.equal(p, q)


@pytest.mark.parametrize("when", [GAP, GAP + 1])
def test_a_gradient_that_is_not_finite_costs_a_step_and_no_more(when):
    """Skipped at a refresh, which stays due, or with a basis on its way: the others are stepped as without it."""
    grads, p, q = gradients(WIDE, STEPS), weight(WIDE), weight(WIDE)
    steps_(made("galore_i3s_adamw", p), p, grads)
    bad = torch.full(WIDE, torch.inf)
    steps_(made("galore_i3s_adamw", q), q, [*grads[:when], bad, *grads[when:]])
    assert torch.equal(p, q)


def test_a_gradient_of_zeros_changes_no_basis():
    grads, p = gradients(WIDE, 2 * GAP), weight(WIDE)
    opt = made("galore_i3s_adamw", p)
    steps_(opt, p, grads[:GAP])
    before = opt.state[p]["basis"].clone()
    steps_(opt, p, [torch.zeros(WIDE)] * (WAIT + 1))
    assert torch.equal(opt.state[p]["basis"], before)
    steps_(opt, p, grads[GAP:][: WAIT + 2])  # it begins again with the first gradient after the one of zeros is seen
    assert int(opt.state[p]["refreshes"]) == 2 and not torch.equal(opt.state[p]["basis"], before)


@pytest.mark.parametrize("name", ["galore_i3s_adamw", "fira_i3s_adamw"])
def test_the_layerwise_mode_equals_the_plain_run(name):
    grads, p, q = gradients(WIDE, STEPS), weight(WIDE), weight(WIDE)
    steps_(made(name, p), p, grads)
    opt = made(name + "_layerwise", q, stagger=False)
    opt.train()
    for G in grads:
        (q * G).sum().backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["galore_dominant_adamw", "galore_i3s_adamw", "fira_i3s_adamw"])
def test_both_sides_and_residuals(name):
    """More than one stored basis, and a step that looks at the gradient: overlaps, energies, and finite weights."""
    options = {} if name.startswith("fira") else {"proj_type": "full"}
    grads, p = gradients(WIDE, STEPS), weight(WIDE)
    opt = made(name, p, **options)
    steps_(opt, p, grads)
    overlap, energy, _ = opt.state[p]["report"].tolist()
    assert 0 < overlap < 1.0001 and 0 < energy < 1.0001 and p.isfinite().all()
    if options:
        P, Q = opt.state[p]["basis"], opt.state[p]["right_basis"]
        assert max((X.mT @ X - torch.eye(3)).abs().max() for X in (P, Q)) < 1e-5


def test_a_state_that_is_dropped_takes_what_goes_on_with_it():
    grads, p, q = gradients(WIDE, STEPS), weight(WIDE), weight(WIDE)
    opt = made("galore_dominant_adamw", p)
    steps_(opt, p, grads[: GAP + 1])
    opt.forget([p])
    W = p.detach().clone()
    q.data.copy_(W)
    steps_(opt, p, grads[GAP + 1 :][:3])
    steps_(made("galore_dominant_adamw", q), q, grads[GAP + 1 :][:3])
    assert int(opt.state[p]["adopt_at"]) == 0
    assert torch.equal(p, q)


def test_what_fails_in_the_thread_is_raised(monkeypatch):
    grads, p = gradients(WIDE, STEPS), weight(WIDE)
    opt = made("galore_dominant_adamw", p)
    steps_(opt, p, grads[: 2 * GAP])  # a basis has been adopted, and lies where the next one is left

    def fail(G: Tensor) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(kernels, "gram_basis", fail)
    with pytest.raises(MemoryError, match="no room"):
        steps_(opt, p, grads[2 * GAP :][:WAIT])
    monkeypatch.undo()
    before = int(opt.state[p]["refreshes"])
    steps_(opt, p, grads[2 * GAP :][:2])  # adopts nothing, and begins again
    assert int(opt.state[p]["refreshes"]) == before == 2 and int(opt.state[p]["adopt_at"]) > 2 * GAP + WAIT


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("galore_dominant_adamw", {"async_refresh": GAP}, "async_refresh must be less than update_proj_gap, 5, got 5"),
        ("galore_dominant_adamw", {"refresh": "power"}, "refresh=power takes too little time"),
        ("galore_dominant_adamw", {"refresh": "randomized"}, "refresh=randomized takes too little time"),
        ("subtrack_adamw", {}, "has no option 'async_refresh'"),
        ("galore_dominant_adamw", {"async_refresh": -1}, "async_refresh must be an integer >= 0"),
    ],
)
def test_what_cannot_go_on_beside_the_steps_is_refused(name, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve.complete(name, {"update_proj_gap": GAP, "async_refresh": WAIT, **options})


def test_moments_are_carried_over_in_full_precision(monkeypatch):
    """Whatever torch's flag for TF32 says, as at a refresh that is waited for."""
    flags, seen = torch.backends.cuda.matmul, []
    rotate = Adam.rotate_

    def looked(self, *args):
        seen.append(flags.fp32_precision if hasattr(flags, "fp32_precision") else flags.allow_tf32)
        rotate(self, *args)

    monkeypatch.setattr(Adam, "rotate_", looked)
    with products.precision("tf32"):
        for wait in (0, WAIT):
            p = weight(WIDE)
            opt = made("galore_dominant_adamw", p, async_refresh=wait, on_refresh="rotate")
            steps_(opt, p, gradients(WIDE, STEPS))
    assert len(seen) > 4 and set(seen) <= {"ieee", False}
