"""Groups that are edited between steps: by a schedule, by hand, and where an edit would change the state."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from streams import TALL, gradients, weight
from torch.optim import swa_utils
from torch.optim.lr_scheduler import CyclicLR, LinearLR, OneCycleLR

import hf_lowrank
from hf_lowrank import METHODS, LowRankOptimizer, Method, Slot
from hf_lowrank.methods import registry
from hf_lowrank.methods.options import integer
from hf_lowrank.methods.subspaces.dominant import Dominant


STEPS = 6


@pytest.fixture
def deep():
    """A row of a part that nobody has heard of, with an option in its slots."""

    @dataclass(frozen=True)
    class Deep(Dominant, key="deep_for_a_test"):
        depth: int = integer(2, minimum=1, help="how many are kept")

        def slots(self):
            return {**super().slots(), "kept": Slot(f"{self.depth} m r")}

    METHODS["deep_for_a_test"] = Method("deep_for_a_test", "adam", "project", "for a test")
    yield "deep_for_a_test"
    del METHODS["deep_for_a_test"], registry.classes("subspace")["deep_for_a_test"]


def two(name="galore_i3s_adamw", **options):
    p, q = weight(TALL), weight((4,))
    groups = [{"params": [p], "rank": 2, "update_proj_gap": 4, **options}, {"params": [q]}]
    return LowRankOptimizer(groups, name, lr=1e-2), p, q


def steps(optimizer, p, q, *, schedule=None, first=0, count=STEPS):
    for t in range(first, first + count):
        p.grad, q.grad = gradients(TALL, 2 * STEPS)[t], torch.randn(4, generator=torch.Generator().manual_seed(t))
        optimizer.step()
        if schedule:
            schedule.step()


@pytest.mark.parametrize("make", [
    lambda o: OneCycleLR(o, max_lr=0.1, total_steps=2 * STEPS),
    lambda o: CyclicLR(o, base_lr=1e-3, max_lr=0.1, step_size_up=2, cycle_momentum=False),
    lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=2),
    lambda o: LinearLR(o, total_iters=4),
    lambda o: LinearLR(o, end_factor=0.0, total_iters=10),  # it ends at -3e-20
], ids=["OneCycleLR", "CyclicLR", "SWALR", "LinearLR", "to zero"])  # fmt: skip
def test_a_schedule_may_keep_keys_of_its_own_in_the_groups(make):
    """The run with it equals one whose rates and betas are set by hand, also over a checkpoint."""
    optimizer, p, q = two()
    schedule = make(optimizer)
    other, p2, q2 = two()
    for t in range(2 * STEPS):
        if t == STEPS:
            again, p3, q3 = two()
            fresh = make(again)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of betas, which OneCycleLR edits
                again.load_state_dict(optimizer.state_dict())
            fresh.load_state_dict(schedule.state_dict())
            with torch.no_grad():
                p3.copy_(p), q3.copy_(q)
            optimizer, schedule, p, q = again, fresh, p3, q3
        for mine, theirs in zip(other.param_groups, optimizer.param_groups, strict=True):
            mine["lr"], mine["betas"] = theirs["lr"], theirs["betas"]
        steps(optimizer, p, q, schedule=schedule, first=t, count=1)
        steps(other, p2, q2, first=t, count=1)
    assert torch.equal(p, p2) and torch.equal(q, q2)


def test_a_layers_own_factor_as_timm_writes_it_is_left_alone():
    optimizer, p, q = two()
    for group in optimizer.param_groups:
        group["lr_scale"] = 0.5
    steps(optimizer, p, q)
    assert int(optimizer.state[p]["step"]) == STEPS


@pytest.mark.parametrize("where", ["constructor", "add_param_group"])
def test_a_typo_is_caught_where_a_group_is_made(where):
    optimizer, _, _ = two()
    group = {"params": [weight((5, 5))], "rank": 2, "update_gap": 4}
    with pytest.raises(ValueError, match="has no option 'update_gap'; did you mean 'update_proj_gap'"):
        LowRankOptimizer([group]) if where == "constructor" else optimizer.add_param_group(group)


def test_two_parts_that_name_a_tensor_alike_are_refused_and_do_not_share_it(deep):
    METHODS[deep] = replace(METHODS[deep], moments="natural_adam")
    deeper = registry.classes("subspace")[deep]
    slots = deeper.slots
    deeper.slots = lambda self: {**slots(self), "window": Slot("m r")}
    with pytest.raises(ValueError, match="two parts of deep_for_a_test both keep a tensor by the name of window"):
        two(deep)[0].declared().__next__()


@pytest.mark.parametrize("how", [{}, {"moments": "natural_adam"}])
def test_the_mean_of_gradients_is_counted_apart_and_former_checkpoints_are_read(how):
    """Its count had the name that Natural GaLore has for its own."""
    made = [two("lowrank", subspace="grassmann", accumulate=True, **how) for _ in range(2)]
    (optimizer, p, q), (again, p2, q2) = made
    steps(optimizer, p, q, count=3)
    state = optimizer.state[p]
    assert int(state["gradients_seen"]) == 2 and int(state.get("seen", 3)) == 3
    saved = copy.deepcopy(optimizer.state_dict())
    if not how:
        saved["state"][0]["seen"] = saved["state"][0].pop("gradients_seen")
    again.load_state_dict(saved)
    with torch.no_grad():
        p2.copy_(p), q2.copy_(q)
    steps(optimizer, p, q, first=3)
    steps(again, p2, q2, first=3)
    assert torch.equal(p, p2)


def test_an_edit_that_would_change_the_state_is_refused_for_a_part_that_nobody_has_heard_of(deep):
    optimizer, p, q = two(deep)
    steps(optimizer, p, q, count=2)
    optimizer.param_groups[0]["depth"] = 3
    before = p.detach().clone()
    with pytest.raises(
        ValueError, match=r"depth \(2\) says which state there is and cannot be changed while training"
    ):
        steps(optimizer, p, q, first=2, count=1)
    assert torch.equal(p, before)
    optimizer.param_groups[0]["depth"] = 2
    steps(optimizer, p, q, first=2, count=1)
    assert int(optimizer.state[p]["step"]) == 3


@pytest.mark.parametrize("how", ["loaded", "exchanged", "copied"])
def test_it_is_refused_right_after_a_load_too(how):
    p, q = weight(TALL), weight((4,))
    optimizer = LowRankOptimizer([{"params": [p], "rank": 1}, {"params": [q]}], "full_muon", lr=1e-2)
    steps(optimizer, p, q, count=2)
    if how == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
    elif how == "exchanged":  # as Lightning does
        optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    else:
        optimizer, p, q = copy.deepcopy((optimizer, p, q))
    optimizer.param_groups[0]["row_scales"] = True
    with pytest.raises(ValueError, match="row_scales .* cannot be changed while training"):
        steps(optimizer, p, q, first=2, count=1)


@pytest.mark.parametrize("split", [False, True])
def test_an_exchanged_group_of_another_rank_is_refused(split):
    optimizer, p, q = two()
    steps(optimizer, p, q, count=2)
    groups = [{**group, **({"rank": 3} if "rank" in group else {})} for group in optimizer.param_groups]
    empty = [{**group, "params": []} for group in groups] if split else []
    optimizer.param_groups = [*empty, *groups]
    with pytest.raises(ValueError, match="rank cannot be changed while training"):
        steps(optimizer, p, q, first=2, count=1)


def test_an_edit_before_the_first_step_counts(deep):
    optimizer, p, q = two(deep)
    optimizer.param_groups[0]["depth"] = 3
    steps(optimizer, p, q, count=1)
    assert optimizer.state[p]["kept"].shape[0] == 3


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("scale", -1, "option scale must be"),
        ("betas", (0.9, 1.5), "betas must be two numbers in"),
        ("lr", "fast", "lr must be a number in"),
        ("lr", float("nan"), "lr must be a number in"),
        ("method", "fira_adamw", "method cannot be changed"),
        ("rank", 3, "rank cannot be changed"),
        ("proj_type", "left", "proj_type cannot be changed"),
    ],
)
def test_a_bad_edit_is_refused_and_changes_nothing(key, value, message):
    optimizer, p, q = two()
    steps(optimizer, p, q, count=2)
    kept = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    before = p.detach().clone(), {name: x.clone() for name, x in optimizer.state[p].items()}
    with pytest.raises(ValueError, match=message):
        steps(optimizer, p, q, first=2, count=1)
    assert torch.equal(p, before[0]) and all(torch.equal(x, optimizer.state[p][name]) for name, x in before[1].items())
    optimizer.param_groups[0][key] = kept
    steps(optimizer, p, q, first=2, count=1)


def test_options_are_resolved_once_for_matrices_and_once_for_the_rest(monkeypatch):
    from hf_lowrank.methods.resolve import Config

    calls, of = [], Config.of.__func__
    monkeypatch.setattr(Config, "of", classmethod(lambda cls, *a, **k: calls.append(a) or of(cls, *a, **k)))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 8))
    groups = hf_lowrank.param_groups(model, method="galore_i3s_adamw", rank=2, weight_decay=0.1)
    optimizer = LowRankOptimizer(groups, "galore_i3s_adamw", seed=7)
    assert len(calls) == 2 and len(optimizer.param_groups) == 2
    assert all(group["seed"] == 7 for group in optimizer.param_groups)
    assert all("config" not in group for group in optimizer.state_dict()["param_groups"])


def test_groups_that_were_edited_after_they_were_made_count_as_they_are():
    model = torch.nn.Linear(8, 8)
    groups = hf_lowrank.param_groups(model, method="galore_i3s_adamw", rank=2, seed=3)
    groups[0]["scale"] = 1.0
    optimizer = LowRankOptimizer(groups, "galore_i3s_adamw", seed=7)
    assert optimizer.param_groups[0]["scale"] == optimizer.configs[0].options["scale"] == 1.0
    assert optimizer.configs[0].options["seed"] == 3


def frozen_net():
    net = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.LayerNorm(12), torch.nn.Linear(12, 8))
    net[0].requires_grad_(False)
    return net


def test_what_was_said_of_a_parameter_outlives_wrappers_and_names():
    net = frozen_net()
    groups = hf_lowrank.param_groups(torch.nn.ModuleDict({"in": net}), method="galore_i3s_adamw", rank=2)
    optimizer = LowRankOptimizer(groups, "galore_i3s_adamw", lr=1e-2)
    net[0].requires_grad_(True)
    net[0] = torch.nn.Sequential(net[0])
    optimizer.add_param_group({"params": [net[0][0].weight]})
    assert optimizer.param_groups[-1]["param_names"] == ["in.0.weight"] and optimizer.param_groups[-1]["rank"] == 2


@pytest.mark.parametrize("method", ["galore_i3s_adamw", None])
def test_parameters_that_are_unfrozen_later_are_low_rank_or_dense_by_the_rules_of_the_start(method):
    net = frozen_net()
    options = {"rank": 2, "update_proj_gap": 3, "weight_decay": 0.1}
    optimizer = LowRankOptimizer(hf_lowrank.param_groups(net, method=method, **options), "galore_i3s_adamw", lr=1e-2)
    known = len(optimizer.param_groups)
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(net[0].parameters()), "lr": 1e-3})
    weights, biases = optimizer.param_groups[known:]
    assert weights["param_names"] == ["0.weight"] and weights["rank"] == 2 and weights["update_proj_gap"] == 3
    assert biases["param_names"] == ["0.bias"] and "rank" not in biases
    assert (weights["weight_decay"], biases["weight_decay"]) == (0.1, 0.0) and weights["lr"] == biases["lr"] == 1e-3
    for _ in range(2):
        net(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
    assert optimizer.state[net[0].weight]["basis"].shape == (8, 2)
    again = frozen_net()
    other = LowRankOptimizer(hf_lowrank.param_groups(again, method=method, **options), "galore_i3s_adamw", lr=1e-2)
    other.add_param_group({"params": list(again[0].parameters())})
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(other.state[again[0].weight]["exp_avg"], optimizer.state[net[0].weight]["exp_avg"])


def test_a_group_with_options_of_its_own_is_taken_as_it_is():
    net = frozen_net()
    optimizer = LowRankOptimizer(hf_lowrank.param_groups(net, rank=2), "galore_i3s_adamw")
    optimizer.add_param_group({"params": [("mine", net[0].weight)], "rank": 5})
    assert optimizer.param_groups[-1]["rank"] == 5 and optimizer.param_groups[-1]["param_names"] == ["mine"]


def test_compiling_the_step_leaves_it_as_it_is():
    """As with torch's own optimizers; it used to end in a RecursionError."""
    optimizer, p, q = two()
    other, p2, q2 = two()
    compiled = torch.compile(optimizer.step)
    for t in range(3):
        for one in ((p, q), (p2, q2)):
            one[0].grad, one[1].grad = gradients(TALL, STEPS)[t], torch.ones(4)
        compiled()
        other.step()
    assert torch.equal(p, p2) and torch.equal(q, q2)


def test_what_was_told_of_the_run_counts_for_groups_that_come_later():
    net = frozen_net()
    optimizer = LowRankOptimizer(hf_lowrank.param_groups(net, method="golore_adamw", rank=2), "golore_adamw")
    optimizer.tell(total_steps=10)
    net[0].requires_grad_(True)
    optimizer.add_param_group({"params": [net[0].weight]})
    assert optimizer.param_groups[-1]["total_steps"] == 10


def test_a_set_of_parameters_is_refused_as_torch_does():
    with pytest.raises(TypeError, match="ordered"):
        LowRankOptimizer([{"params": {weight(TALL)}}], "galore_i3s_adamw")


def test_a_value_that_is_given_as_text_is_taken_for_what_it_says():
    runs = []
    for text in (False, True):
        p = weight(TALL)
        opt = LowRankOptimizer([{"params": [p], "rank": 2}], "galore_dominant_adamw", lr=1e-2)
        for t, G in enumerate(gradients(TALL, STEPS)):
            if t == 2:
                edited = {"max_grad_norm": "1.0", "scale": "0.5"} if text else {"max_grad_norm": 1.0, "scale": 0.5}
                opt.param_groups[0].update(edited)
            p.grad = G.clone()
            opt.step()
        runs.append(p)
    assert torch.equal(*runs) and opt.param_groups[0]["max_grad_norm"] == 1.0
