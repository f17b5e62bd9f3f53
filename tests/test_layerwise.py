"""The layerwise mode in plain PyTorch: the plain run bit for bit, with gradients freed during backward."""

import copy
import gc
import weakref

import pytest
import torch
from distributed import models
from streams import COVERING, WIDE, gradients, optimizer, weight
from torch.distributed._tools.mem_tracker import MemTracker

import hf_lowrank
from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.methods import resolve


STEPWISE = [name for name in COVERING if not resolve.parts(name, {}).needs_gradient]
IN_HOOK = [name for name in COVERING if name not in STEPWISE]


def run(name, steps=8, dtype=torch.float32, **options):
    net = models.model(dtype, experts=2)
    opt = models.optimizer(net, name, **options)
    models.train(net, opt, steps)
    return net, opt


def matrices(opt):
    return [p for group in opt.param_groups if "rank" in group for p in group["params"]]


@pytest.mark.parametrize("stagger, dtype", [(False, torch.float32), (True, torch.bfloat16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", COVERING)
def test_it_equals_the_plain_run_bit_for_bit(name, stagger, dtype):
    plain, a = run(name, dtype=dtype, stagger=stagger)
    layerwise, b = run(name + "_layerwise", dtype=dtype, stagger=stagger)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), layerwise.parameters(), strict=True))
    for p, q in zip(plain.parameters(), layerwise.parameters(), strict=True):
        assert all(torch.equal(a.state[p][key], b.state[q][key]) for key in a.state[p])


def is_due(state):
    """Whether a refresh is to come before the next step; what is stepped whole has none."""
    return "refresh_at" in state and bool(state["step"] >= state["refresh_at"])


@pytest.mark.parametrize("name", COVERING)
def test_gradients_are_gone_before_step_but_for_the_matrices_that_are_due(name):
    net, opt = run(name + "_layerwise", steps=1, update_proj_gap=4)
    for step in range(1, 9):
        opt.zero_grad()
        models.loss_of(net, step).backward()
        due = [is_due(opt.state[p]) for p in matrices(opt)]
        stepped = [p.grad is None for p in matrices(opt)]
        if name in IN_HOOK:  # an updated matrix has counted its step already, and may be due at the next
            assert all(p.grad is None or d for p, d in zip(matrices(opt), due, strict=True))
        else:
            assert stepped == [not d for d in due]
        opt.step()


class Wide(torch.nn.Module):
    """Six matrices of one size, so that 'the two largest' are two sixths of all gradients."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(256, 256, bias=False) for _ in range(6)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


@pytest.mark.parametrize("name", ["galore_i3s_adamw_layerwise", "fira_adamw_layerwise", "galore_i3s_adamw"])
def test_peak_gradient_memory_is_that_of_two_matrices(name):
    torch.manual_seed(0)
    net = Wide()
    opt = models.optimizer(net, name, rank=16, update_proj_gap=1000)
    x = torch.randn(4, 256)
    opt.train()
    net(x).backward()
    opt.step()
    opt.zero_grad()
    tracker = MemTracker()
    tracker.track_external(net, opt)
    with tracker:
        net(x).backward()
    peak = next(iter(tracker.get_tracker_snapshot("peak").values()))
    gradients = next(size for kind, size in peak.items() if "grad" in str(kind).lower())
    one = 256 * 256 * 4
    if name.endswith("layerwise"):
        assert gradients <= 2 * one
    else:
        assert gradients >= 5 * one  # the tracker sees what the plain run keeps


def micro(net, opt, step, pieces):
    opt.train()
    opt.zero_grad()
    for i in range(pieces):
        (models.loss_of(net, step, i, pieces) / pieces).backward()
        kept = [p for p in matrices(opt) if p.grad is not None]
        assert all(opt.state[p]["step"] >= opt.state[p]["refresh_at"] for p in kept)  # only those that are due
    opt.step()


@pytest.mark.parametrize("name", STEPWISE)
def test_four_micro_batches_equal_one_batch_from_the_second_step_on(name):
    options = {"refresh": "svd"} if METHODS[name].subspace in ("uniform", "hybrid") else {}
    split, a = run(name + "_layerwise", steps=0, **options)
    micro(split, a, 0, 4)  # the first window has its bases from its first micro-batch
    whole, b = run(name + "_layerwise", steps=0, **options)
    micro(whole, b, 0, 1)
    whole.load_state_dict(split.state_dict())
    b.load_state_dict(a.state_dict())
    start = [p.detach().clone() for p in whole.parameters()]
    for step in range(1, 5):
        micro(split, a, step, 4)
        micro(whole, b, step, 1)
    pair = [[p.detach() for p in net.parameters()] for net in (split, whole)]
    # sums in another order (1e-7), amplified by Adam and, for sampled tails, by the refresh
    assert models.displacement(*pair, start) < (1e-2 if METHODS[name].subspace in ("uniform", "hybrid") else 1e-4)


@pytest.mark.parametrize("name", STEPWISE)
def test_a_first_micro_batch_without_tokens_changes_nothing(name):
    """Its gradient is zero, and no basis comes of it; nor may moments that are kept for another."""
    ends = []
    for mode in ("", "_layerwise"):
        p = weight(WIDE)
        opt = optimizer(p, name + mode, update_proj_gap=3)
        opt.train()
        for G in gradients(WIDE, 8):
            opt.zero_grad()
            for one in (torch.zeros_like(G), G):
                (p * one).sum().backward()
            opt.step()
        ends.append((p.detach(), opt.state[p]))
    (p, plain), (q, layerwise) = ends
    assert torch.equal(p, q) and all(torch.equal(plain[key], layerwise[key]) for key in plain)


@pytest.mark.parametrize("name", ["galore_i3s_adamw", "fira_adamw", "full_adamw"])
@pytest.mark.parametrize("how", [True, "offload"])
def test_sparse_gradients_are_refused_in_the_backward_pass(name, how):
    p = weight(WIDE)
    opt = optimizer(p, name, layerwise=how)
    opt.train()
    with pytest.raises(ValueError, match="sparse=False"):
        torch.nn.functional.embedding(torch.tensor([1]), p, sparse=True).sum().backward()
    assert torch.equal(p, weight(WIDE))


@pytest.mark.parametrize("name", IN_HOOK)
def test_a_method_that_updates_in_the_hook_refuses_a_second_gradient(name):
    net, opt = run(name + "_layerwise", steps=1)
    models.loss_of(net, 1).backward()
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps=1"):
        models.loss_of(net, 1).backward()


@pytest.mark.parametrize("name", ["galore_i3s_adamw_layerwise", "fira_i3s_adamw_layerwise"])
def test_the_learning_rate_of_the_step_is_the_one_used(name):
    net, opt = run(name, steps=3)
    before = [p.detach().clone() for p in net.parameters()]
    for group in opt.param_groups:
        group["lr"] = 0.0
    models.train(net, opt, 1, start=3)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("name", ["galore_i3s_adamw_layerwise", "fira_i3s_adamw_layerwise"])
@pytest.mark.parametrize("cut", [1, 3, 4])
def test_it_resumes_bit_for_bit(name, cut):
    whole, _ = run(name, steps=8)
    half, a = run(name, steps=cut)
    rest = models.model(experts=2)
    rest.load_state_dict(half.state_dict())
    b = models.optimizer(rest, name)
    b.load_state_dict(a.state_dict())
    models.train(rest, b, 8 - cut, start=cut)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), rest.parameters(), strict=True))


def test_clipping_is_by_the_norm_of_the_projected_gradients():
    limit = 0.05
    once = {"update_proj_gap": 3, "stagger": False}
    clipped, opt = run("galore_random_adamw_layerwise", steps=3, max_grad_norm=limit, **once)
    by_hand, other = run("galore_random_adamw", steps=0, **once)
    for step in range(3):
        other.zero_grad()
        models.loss_of(by_hand, step).backward()
        squares = 0.0
        refreshed = {p: other.state[p]["basis"] for p in matrices(other) if other.state.get(p)}
        for p in by_hand.parameters():
            grad = p.grad
            if p in refreshed and step % 3:
                wide = grad.mT if grad.shape[-2] >= grad.shape[-1] else grad
                grad = refreshed[p].mT @ wide
            elif any(p is q for q in matrices(other)):
                copy = next(q for q, r in zip(clipped.parameters(), by_hand.parameters(), strict=True) if r is p)
                wide = grad.mT if grad.shape[-2] >= grad.shape[-1] else grad
                grad = (
                    opt.state[copy]["basis"].mT @ wide
                )  # the random basis of the first step, known from the other run
            squares += grad.square().sum()
        factor = min(1.0, limit / (squares.sqrt().item() + 1e-6))
        assert factor < 1
        for p in by_hand.parameters():
            p.grad.mul_(factor)
        other.step()
    start = [p.detach() for p in models.model(experts=2).parameters()]
    pair = [[p.detach() for p in net.parameters()] for net in (clipped, by_hand)]
    assert models.displacement(*pair, start) < 1e-5  # a factor before or after a product, in fp32


def test_a_second_optimizer_takes_the_hooks_over():
    net = models.model()
    first = models.optimizer(net, "galore_i3s_adamw_layerwise")
    models.train(net, first, 2)
    second = models.optimizer(net, "galore_dominant_adamw_layerwise")
    models.train(net, second, 2)
    assert all(int(first.state[p]["step"]) == 2 and int(second.state[p]["step"]) == 2 for p in matrices(first))


def test_a_hook_holds_no_reference_to_the_optimizer():
    net = models.model()
    opt = models.optimizer(net, "galore_i3s_adamw_layerwise")
    models.train(net, opt, 1)
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None
    models.loss_of(net, 0).backward()
    assert all(p.grad is not None for p in net.parameters())  # nobody takes them any more


def test_clipping_is_refused_where_it_would_not_be_exact():
    with pytest.raises(ValueError, match="set max_grad_norm=0"):
        models.optimizer(models.model(), "fira_adamw_layerwise", max_grad_norm=1.0)


@pytest.mark.parametrize("name", ["galore_i3s_adamw", "fira_adamw", "full_adamw", "full_muon"])
def test_a_run_that_leaves_the_mode_accumulates_as_any_other(name):
    ends = []
    for ending in ("_layerwise", ""):
        net = models.model(experts=2)
        opt = models.optimizer(net, name + ending, **({} if METHODS[name].subspace == "whole" else {"stagger": False}))
        models.train(net, opt, 2)
        for group in opt.param_groups:
            group["layerwise"] = False
        for step in range(2, 5):
            opt.train()
            opt.zero_grad()
            for micro in (0, 1):
                models.loss_of(net, 2 * step + micro).backward()
            opt.step()
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


EDITS = {
    "lr": lambda opt: [group.update(lr=1e-3) for group in opt.param_groups],
    "betas": lambda opt: [group.update(betas=(0.5, 0.8)) for group in opt.param_groups],
    "weight_decay": lambda opt: [group.update(weight_decay=0.3) for group in opt.param_groups],
    "scale": lambda opt: [group.update(scale=0.1) for group in opt.param_groups if "rank" in group],
    "a group that is added": lambda opt: opt.add_param_group({"params": [("new", torch.nn.Parameter(torch.ones(3)))]}),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("name", ["galore_i3s_adamw", "galore_dominant_muon", "q_galore_adamw"])
def test_an_edit_between_backward_and_step_counts_at_that_step(name, edit):
    """As it does in the plain run: no gradient is lost, and the values are those of now."""
    nets = []
    for ending in ("", "_layerwise"):
        net = models.model(experts=2)
        opt = models.optimizer(net, name + ending, stagger=True)
        opt.train()
        for step in range(6):
            opt.zero_grad()
            models.loss_of(net, step).backward()
            if step == 4:
                edit(opt)
            opt.step()
        nets.append(net)
    assert all(torch.equal(a, b) for a, b in zip(*(net.parameters() for net in nets), strict=True))


def test_what_is_forgotten_between_backward_and_step_loses_its_projected_gradient_alone():
    net = models.model(experts=2)
    opt = models.optimizer(net, "galore_i3s_adamw_layerwise")
    models.train(net, opt, 1)
    before = [p.detach().clone() for p in matrices(opt)]
    models.loss_of(net, 1).backward()
    forgotten = next(p for p in matrices(opt) if p.grad is None)  # that of one which is due is there as it is
    opt.forget([forgotten])
    opt.step()
    for p, old in zip(matrices(opt), before, strict=True):
        assert torch.equal(p, old) == (p is forgotten)


@pytest.mark.parametrize("name", ["q_galore_adamw", "galore_i3s_adamw"])
def test_what_waits_for_the_step_is_what_was_projected(name):
    """And no basis that was decoded for it."""
    # 128 x 32 elements of a basis: fewer are not kept in 8 or 4 bits
    weights = [torch.nn.Parameter(torch.randn(128, 160)) for _ in range(8)]
    groups = [{"params": weights, "rank": 32, "update_proj_gap": 50}]
    opt = LowRankOptimizer(groups, f"{name}_layerwise")
    opt.train()
    for step in range(2):
        x = torch.randn(4, 128, generator=torch.Generator().manual_seed(step))
        loss = sum((x @ p).square().sum() for p in weights)
        before = storages()
        loss.backward()
        if not step:
            opt.step()
    del loss, x
    projected = 8 * 32 * 160 * 4
    assert storages() - before <= projected


def storages():
    """Bytes of all tensors."""
    gc.collect()
    alive = [x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({one.data_ptr(): one.nbytes() for one in alive}.values())


def test_several_edits_and_micro_batches_count_as_in_the_plain_run():
    """Steps are handed over more than once, and the mode may be left between backward and step."""
    nets = []
    for ending in ("", "_layerwise"):
        net = models.model(experts=2)
        opt = models.optimizer(net, "galore_random_adamw" + ending, stagger=True, update_proj_gap=50)
        opt.train()
        for step in range(3):
            opt.zero_grad()
            for i in range(3 if step == 1 else 1):
                models.loss_of(net, 10 * step + i).backward()
                if step == 1 and i == 0:
                    opt.forget([forgotten := matrices(opt)[-1]])  # all steps are made anew, those that wait as well
            if step == 1:
                for group in opt.param_groups:
                    group.update({"weight_decay": 0.3, **({"scale": 0.5} if "rank" in group else {})})
            if step == 2 and ending:
                for group in opt.param_groups:
                    group.update(layerwise=False)
            for group in opt.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            opt.step()
        nets.append([p for p in net.parameters() if p is not forgotten])
    a, b = (torch.cat([p.detach().flatten() for p in net]) for net in nets)
    travelled = 1e-2 * len(a) ** 0.5  # one step of Adam's at the first rate
    # projections of parts are added up in another order, and Adam brings small sums to the size of large ones
    assert (a - b).norm() < 1e-4 * travelled


def test_dense_parameters_are_stepped_as_the_matrices_of_their_model_are():
    """By what the options of those make of the method, when it is built and after a load."""
    spam = {"method": "galore_dominant_adamw", "stable_spam": True}
    kept = {"method": "lowrank", "subspace": "random", "reconstruction": "error_feedback", "error_feedback": "off"}
    for options, in_hook in ((spam, True), (kept, False)):
        net = models.model()
        opt = LowRankOptimizer(hf_lowrank.param_groups(net, rank=3, layerwise=True, **options))
        again = LowRankOptimizer(hf_lowrank.param_groups(net, rank=3, layerwise=True, **options))
        again.load_state_dict(opt.state_dict())
        for one in (opt, copy.deepcopy(opt), again):
            assert [config.hooked for config in one.configs if not config.low_rank] == 2 * [in_hook]
