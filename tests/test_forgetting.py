"""State that is dropped and made anew: what requires no gradient has counters alone, and a second visit is fresh."""

import copy
from itertools import pairwise

import pytest
import torch
from distributed import models
from streams import COVERING, NAMES, WIDE, finish, gradients, optimizer, weight

from hf_lowrank.state import view


COUNTERS = {"step", "moment_step", "skipped", "refreshes", "refresh_at", "earlier", "dropped_at"}
RANDOM = ("golore_adamw", "galore_i3s_adamw", "grass_adamw", "apollo_random_adamw", "flora_adafactor")
GAP = 3


def short(name, p, **options):
    return optimizer(p, name, rank=2, update_proj_gap=GAP, **options)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_forgotten_and_trained_again_is_a_fresh_run(name):
    """Bit for bit, once the counters by which its random numbers are others than before are set back."""
    p, stream = weight(WIDE), gradients(WIDE, 12)
    opt = short(name, p)
    finish(opt, p, stream[:5])
    q = torch.nn.Parameter(p.detach().clone())
    opt.forget([p])
    if "earlier" in opt.state[p]:
        opt.state[p]["earlier"].zero_()
    if name in ("flora_adafactor", "golore_adamw", "golore_msgd"):  # which look at the step of the run
        opt.state[p]["step"].zero_()
        opt.state[p]["refresh_at"].zero_()
    assert torch.equal(finish(opt, p, stream[5:]), finish(short(name, q), q, stream[5:]))


def test_stable_spam_begins_anew_with_the_visit():
    """Its means are corrected for their start at zero by the steps since then: a first step is along the gradient."""
    p, stream = weight(WIDE), gradients(WIDE, 30)
    opt = optimizer(p, "full_msgd", stable_spam=True, betas=(0.0, 0.999), lr=1.0)
    finish(opt, p, stream[:-1])
    opt.forget([p])
    before = p.detach().clone()
    moved = before - finish(opt, p, stream[-1:])
    assert torch.cosine_similarity(moved.flatten(), stream[-1].flatten(), dim=0) > 1 - 1e-6


@pytest.mark.parametrize("name", RANDOM)
def test_a_second_visit_draws_another_basis(name):
    """From the same gradient: a draw is keyed by the number of bases so far, those of earlier visits included."""
    options = {"switch_at": 0.0} if name == "golore_adamw" else {}
    p, G = weight(WIDE), gradients(WIDE, 1)[0]
    opt, seen = short(name, p, **options), []
    for _ in range(4):
        finish(opt, p, [G])
        seen.append(opt._work.by_weight[p].basis_in_use().project(torch.eye(WIDE[0])))
        opt.forget([p])
    assert int(opt.state[p]["earlier"]) == 4 and int(opt.state[p]["step"]) == 4
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


@pytest.mark.parametrize("visit", [1, 2, 4])
def test_the_interval_begins_with_the_visit(visit):
    p, stream = weight(WIDE), gradients(WIDE, 12)
    opt = short("galore_dominant_adamw", p)
    finish(opt, p, stream[:visit])
    opt.forget([p])
    refreshed = []
    for t, G in enumerate(stream[visit:]):
        before = int(opt.state[p]["refreshes"])
        finish(opt, p, [G])
        refreshed += [t] * (int(opt.state[p]["refreshes"]) - before)
    assert refreshed == list(range(0, len(stream) - visit, GAP))


@pytest.mark.parametrize("name", COVERING)
def test_state_is_there_for_what_requires_a_gradient_alone(name):
    net = models.model(torch.float32, experts=2)
    opt = models.optimizer(net, name)
    asleep = [p for i, p in enumerate(net.parameters()) if i % 2]
    for p in asleep:
        p.requires_grad_(False)
    start = [p.clone() for p in asleep]
    models.train(net, opt, 3)
    gauges = {*opt.gauges(), "report"}
    assert all(opt.state[p].keys() - gauges <= COUNTERS and opt.state[p]["step"] == 0 for p in asleep)
    assert all(torch.equal(a, b) for a, b in zip(start, asleep, strict=True))  # nor do they decay
    assert opt.declared_bytes() == sum(map(view.nbytes, opt.state.values()))
    for p in asleep:
        p.requires_grad_(True)
    models.train(net, opt, 1)
    assert all(opt.state[p]["step"] == 1 for p in asleep)
    assert opt.declared_bytes() == sum(map(view.nbytes, opt.state.values()))


def visits(net, opt, turns):
    """Train every parameter but one in three, another one at each turn, for two steps; drop what leaves."""
    for turn in turns:
        resting = [p for i, p in enumerate(net.parameters()) if i % 3 == turn % 3]
        for p in net.parameters():
            p.requires_grad_(all(p is not other for other in resting))
        opt.forget(resting)
        opt.train()
        models.train(net, opt, 2, start=2 * turn)


@pytest.mark.parametrize("name", COVERING)
def test_resumed_while_some_are_asleep_it_is_the_same_run(name):
    net = models.model(torch.float32, experts=2)
    opt = models.optimizer(net, name)
    visits(net, opt, range(3))
    again = copy.deepcopy(net)
    saved = copy.deepcopy(opt.state_dict())
    resumed = models.optimizer(again.requires_grad_(True), name)
    resumed.load_state_dict(saved)
    visits(net, opt, range(3, 6))
    visits(again, resumed, range(3, 6))
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
        assert opt.state[p].keys() == resumed.state[q].keys()
        assert all(torch.equal(opt.state[p][key], resumed.state[q][key]) for key in opt.state[p])


@pytest.mark.parametrize("name", COVERING)
def test_the_layerwise_mode_follows(name):
    runs = []
    for ending in ("", "_layerwise"):
        net = models.model(torch.float32, experts=2)
        opt = models.optimizer(net, name + ending, stagger=False)
        visits(net, opt, range(4))
        opt.remove_hooks()
        runs.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_checkpoint_from_before_bases_were_counted_loads():
    p, stream = weight(WIDE), gradients(WIDE, 8)
    opt = short("galore_i3s_adamw", p)
    finish(opt, p, stream[:4])
    saved, q = copy.deepcopy(opt.state_dict()), torch.nn.Parameter(p.detach().clone())
    del saved["state"][0]["earlier"], saved["state"][0]["dropped_at"]
    resumed = short("galore_i3s_adamw", q)
    resumed.load_state_dict(saved)
    assert torch.equal(finish(opt, p, stream[4:]), finish(resumed, q, stream[4:]))


def test_a_parameter_that_lost_a_part_of_its_state_is_refused():
    p = weight(WIDE)
    opt = short("galore_dominant_adamw", p)
    finish(opt, p, gradients(WIDE, 2))
    saved = opt.state_dict()
    del saved["state"][0]["basis"]
    with pytest.raises(ValueError, match="does not fit: it lacks basis"):
        opt.load_state_dict(saved)
