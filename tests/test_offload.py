"""Gradients that wait in host memory until the step: the plain run, accumulation and clipping included."""

import pytest
import torch
from distributed import models
from streams import COVERING

from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.engine import edits, layerwise
from hf_lowrank.engine.offload import Offloaded


SOME = ["fira_adamw", "galore_i3s_adamw", "full_sgd"]


def build(name, dtype=torch.float32, **options):
    net = models.model(dtype, experts=2)
    usual = {} if METHODS[name].subspace == "whole" else {"stagger": False}
    return net, models.optimizer(net, name, **usual, **options)


def backward(net, step, pieces):
    for i in range(pieces):
        (models.loss_of(net, step, i, pieces) / pieces).backward()


def train(net, opt, steps, pieces=3, clip=0.0, first=0):
    for step in range(first, first + steps):
        opt.train()
        opt.zero_grad()
        backward(net, step, pieces)
        if clip:
            torch.nn.utils.clip_grad_norm_([p for group in opt.param_groups for p in group["params"]], clip)
        opt.step()


def equal(a, b, opt, other):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(opt.state[p][key], other.state[q][key]) for key in opt.state[p])


@pytest.mark.parametrize("dtype, clip", [(torch.float32, 0.05), (torch.bfloat16, 0.0)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", COVERING)
def test_it_accumulates_and_clips_as_the_plain_run_bit_for_bit(name, dtype, clip):
    """torch.nn.utils.clip_grad_norm_ adds the squares up in the order of the parameters: here that of the groups."""
    net, plain = build(name, dtype)
    train(net, plain, 7, clip=clip)
    other, opt = build(name, dtype, layerwise="offload", max_grad_norm=clip)
    train(other, opt, 7)
    equal(net, other, plain, opt)
    assert clip == 0 or opt.grad_norm > clip


@pytest.mark.parametrize("name", SOME)
def test_groups_are_looked_at_once_a_backward_pass(name, monkeypatch):
    net, opt = build(name, layerwise="offload")
    train(net, opt, 1)
    looks, look = [], edits.Resolved.look
    monkeypatch.setattr(edits.Resolved, "look", lambda self, *given: looks.append(1) or look(self, *given))
    opt.zero_grad()
    backward(net, 1, 3)
    assert len(looks) == 1


@pytest.mark.parametrize("name", SOME)
def test_one_gradient_at_a_time_lies_at_its_parameter(name, monkeypatch):
    net, opt = build(name, layerwise="offload", max_grad_norm=0.1)
    most, update_ = {"backward": 0, "step": 0}, layerwise.step.update_

    def look(where):
        most[where] = max(most[where], sum(p.grad is not None for p in net.parameters()))

    def looking(*arguments):
        look("step")
        update_(*arguments)

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda _: look("backward"))  # before ours
    monkeypatch.setattr(layerwise.step, "update_", looking)
    train(net, opt, 4)
    assert most == {"backward": 1, "step": 1}
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", SOME)
def test_a_gradient_that_is_not_finite_skips_its_parameter_alone(name):
    net, opt = build(name, layerwise="offload", max_grad_norm=0.1)
    train(net, opt, 2)
    opt.zero_grad()
    backward(net, 2, 1)
    bad = net.blocks[0].up.weight
    bad.grad = torch.full_like(bad, torch.inf)  # and no hook sees it
    opt.step()
    assert {int(opt.state[p]["skipped"]) for p in net.parameters() if p is not bad} == {0}
    assert int(opt.state[bad]["skipped"]) == 1
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_zero_grad_drops_what_waits():
    net, opt = build("fira_adamw", layerwise="offload")
    train(net, opt, 1)
    before = [p.detach().clone() for p in net.parameters()]
    backward(net, 1, 2)
    opt.zero_grad()
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(before, net.parameters(), strict=True))


def test_it_resumes_a_run_of_another_mode():
    net, plain = build("fira_adamw")
    train(net, plain, 3)
    other, opt = build("fira_adamw", layerwise="offload")
    other.load_state_dict(net.state_dict())
    opt.load_state_dict(plain.state_dict())
    train(net, plain, 4, first=3)
    train(other, opt, 4, first=3)
    equal(net, other, plain, opt)
    assert opt.param_groups[0]["layerwise"] == "offload"


def test_all_groups_are_clipped_by_one_norm():
    weights = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    groups = [{"params": [p], "rank": 2, "max_grad_norm": 1.0} for p in weights]
    groups[0]["layerwise"] = "offload"
    opt = LowRankOptimizer(groups, "galore_dominant_adamw")
    with pytest.raises(ValueError, match="in all groups, or in none"):
        opt.step()


def test_host_memory_is_kept_from_one_step_to_the_next():
    """On an accelerator gradients are copied; here the copy is asked for by itself."""
    weight, held = torch.nn.Parameter(torch.zeros(3, 4)), Offloaded()
    first = held._moved(weight, torch.full((3, 4), 1.0))
    assert torch.equal(first, torch.full((3, 4), 1.0))
    again = held._moved(weight, torch.full((3, 4), 2.0))
    assert again.data_ptr() == first.data_ptr() and torch.equal(again, torch.full((3, 4), 2.0))
