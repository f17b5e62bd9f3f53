"""What people do around an optimizer: copy it, edit it, replace it, clip, autocast, load the wrong thing."""

import copy
import gc
import io
import pickle

import pytest
import torch
from distributed import models
from streams import COVERING
from torch import nn

from hf_lowrank import LowRankOptimizer
from hf_lowrank.engine import step as engine_step
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.tensors import kernels


def finite(opt):
    return all(torch.isfinite(v.float()).all() for s in opt.state.values() for v in s.values())


def pair(name="galore_i3s_adamw", **options):
    gen = torch.Generator().manual_seed(0)
    w, b = (nn.Parameter(torch.randn(shape, generator=gen)) for shape in ((8, 16), (5,)))
    group = {"params": [w], "rank": 2, "update_proj_gap": 2, **options}
    return LowRankOptimizer([group, {"params": [b]}], name, lr=1e-2), w, b


def give(w, b, seed):
    gen = torch.Generator().manual_seed(seed)
    w.grad, b.grad = torch.randn(w.shape, generator=gen), torch.randn(b.shape, generator=gen)


@pytest.mark.parametrize("how", ["rotate", "rotate_variance", "rotate_variance_complete"])
@pytest.mark.parametrize("betas", [(0.9, 0.8), (0.9, 0.0), (0.0, 0.999)])
def test_moments_that_know_no_bound_stay_finite(how, betas):
    w = nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))
    opt = LowRankOptimizer([{"params": [w], "rank": 2, "update_proj_gap": 2, "on_refresh": how}], betas=betas)
    for seed in range(6):
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(seed))
        w.grad[:, 3] = 0  # V stays zero there
        opt.step()
    assert torch.isfinite(w).all() and finite(opt)


@pytest.mark.parametrize("name", COVERING)
def test_a_copy_goes_on_as_the_original(name):
    net = models.model(experts=2)
    opt = models.optimizer(net, name)
    models.train(net, opt, 2)
    net_2, opt_2 = copy.deepcopy((net, opt))
    models.train(net, opt, 3, start=2)
    models.train(net_2, opt_2, 3, start=2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), net_2.parameters(), strict=True))


def test_a_model_with_hooks_can_be_saved_whole():
    net = models.model()
    models.train(net, models.optimizer(net, "galore_i3s_adamw_layerwise"), 1)
    torch.save(net.state_dict(), io.BytesIO())
    assert not any("hf_lowrank" in key for p in net.parameters() for key in vars(p))


@pytest.mark.parametrize("hooks", [False, True])
def test_torch_may_still_swap_the_parameters_of_a_model(hooks):
    """As FSDP2's modules have theirs moved and cast: a weak reference to a parameter would forbid it."""
    net = models.model()
    first = models.optimizer(net, "galore_i3s_adamw" + "_layerwise" * hooks)
    first.train()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    if hooks:  # they went with what was swapped out
        first.train()
        models.loss_of(net, 0).backward()
        assert any(p.grad is None for p in net.parameters())


def test_hooks_are_those_of_the_optimizer_after_a_load_too():
    net = models.model()
    opt = models.optimizer(net, "galore_i3s_adamw_layerwise")
    models.train(net, opt, 2)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.remove_hooks()
    models.loss_of(net, 2).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_hooks_of_an_optimizer_go_with_it():
    net = models.model()
    for _ in range(3):
        models.optimizer(net, "galore_i3s_adamw_layerwise").train()
        gc.collect()
    assert max(len(p._post_accumulate_grad_hooks or ()) for p in net.parameters()) == 0


@pytest.mark.parametrize("how", ["loaded", "copied", "unpickled"])
def test_what_was_told_of_the_run_is_known_to_a_group_that_is_added_later(how):
    opt, _, _ = pair("golore_adamw")
    opt.tell(total_steps=10)
    if how == "loaded":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        opt = copy.deepcopy(opt) if how == "copied" else pickle.loads(pickle.dumps(opt))
    opt.add_param_group({"params": [nn.Parameter(torch.ones(4, 8))], "rank": 2})
    assert [group["total_steps"] for group in opt.param_groups if "rank" in group] == [10, 10]


def test_hooks_around_a_load_see_what_is_loaded():
    opt, w, b = pair()
    give(w, b, 0)
    opt.step()
    saved, seen = opt.state_dict(), []
    new, v, _ = pair()
    new.register_load_state_dict_pre_hook(lambda _, given: seen.append(len(given["state"])))
    new.register_load_state_dict_pre_hook(lambda _, given: {**given, "state": {**given["state"], 0: changed}})
    new.register_load_state_dict_post_hook(lambda it: seen.append(int(it.state[v]["step"])))
    changed = {**saved["state"][0], "step": torch.tensor(7)}
    new.load_state_dict(saved)
    new.register_load_state_dict_pre_hook(lambda _, given: given.pop("state"))
    with pytest.raises(ValueError, match="no optimizer checkpoint"):
        new.load_state_dict(saved)
    assert seen == [2, 7, 2]
    assert int(saved["state"][0]["step"]) == 1  # the caller's is left as it was


@pytest.mark.parametrize("other", ["plain", "layerwise"])
def test_another_optimizer_of_ours_takes_over_a_model_while_the_first_lives(other):
    net = models.model()
    first = models.optimizer(net, "galore_i3s_adamw_layerwise")
    models.train(net, first, 2)
    second = models.optimizer(net, "galore_i3s_adamw" + ("_layerwise" if other == "layerwise" else ""))
    before = [p.detach().clone() for p in net.parameters()]
    models.train(net, second, 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert {int(s["step"]) for s in first.state.values()} == {2}


def test_zero_grad_discards_what_was_projected():
    runs = []
    for name in ("galore_i3s_adamw", "galore_i3s_adamw_layerwise"):
        net = models.model()
        opt = models.optimizer(net, name, stagger=False)
        models.train(net, opt, 2)
        models.loss_of(net, 7).backward()  # thought better of
        opt.zero_grad()
        models.train(net, opt, 2, start=2)
        runs.append(list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_loading_discards_what_was_projected():
    net = models.model()
    opt = models.optimizer(net, "galore_i3s_adamw_layerwise")
    models.train(net, opt, 1)
    saved = copy.deepcopy(opt.state_dict())
    models.loss_of(net, 1).backward()
    opt.load_state_dict(saved)
    opt.step()  # what still has a gradient: dense parameters and the matrices that are due
    assert all(int(s["step"]) <= 2 for s in opt.state.values())
    assert any(int(s["step"]) == 1 for s in opt.state.values())


def test_clipping_leaves_a_bad_gradient_out_of_the_norm():
    opt, w, b = pair(max_grad_norm=0.5)
    for seed in range(4):
        give(w, b, seed)
        if seed == 2:
            b.grad[0] = float("inf")
            before = w.detach().clone()
        opt.step()
        if seed == 2:
            assert not torch.equal(before, w)  # the matrix was stepped, by a gradient of its own norm
    assert int(opt.state[b]["skipped"]) == 1 and int(opt.state[w]["skipped"]) == 0 and finite(opt)


@pytest.mark.parametrize("dropped", ["by zero_grad", "by hand"])
def test_a_step_that_an_error_ends_leaves_nothing_for_the_next(dropped, monkeypatch):
    """What was clipped and waits to be stepped goes with its gradient."""
    opt, w, b = pair("galore_dominant_adamw", max_grad_norm=0.5)
    fresh, v, c = pair("galore_dominant_adamw", max_grad_norm=0.5)
    for one, x, y in ((opt, w, b), (fresh, v, c)):
        give(x, y, 0)
        one.step()
    give(w, b, 1)
    with monkeypatch.context() as patched:
        patched.setattr(engine_step, "update_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
    if dropped == "by zero_grad":
        opt.zero_grad()
    for one, x, y in ((opt, w, b), (fresh, v, c)):
        give(x, y, 2)
        one.step()
    assert torch.equal(w, v) and torch.equal(b, c)


def test_norms_of_a_gradient_whose_step_was_interrupted_are_not_those_of_the_next(monkeypatch):
    """Of SCALE, the row that keeps norms on a CPU, too."""
    ends = []
    for breaks in (False, True):
        p = torch.nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))
        opt = LowRankOptimizer([{"params": [p], "rank": 1}], "scale_sgd", lr=1e-2)
        if breaks:
            p.grad = torch.full((6, 10), 1000.0)
            with monkeypatch.context() as patched:
                patched.setattr(MatrixStep, "_write_", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    opt.step()
        p.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
        opt.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("options, words", [
    ({"layerwise": "offload"}, "layerwise=offload, where gradients wait"),
    ({"async_refresh": 1}, "async_refresh: every process"),
])  # fmt: skip
def test_what_reduce_projected_does_not_go_together_with_is_refused(options, words):
    with pytest.raises(ValueError, match=f"reduce_projected does not go together with {words}"):
        opt, w, b = pair(reduce_projected=True, **options)
        give(w, b, 0)
        opt.step()


def test_a_step_without_gradients_changes_nothing():
    opt, w, b = pair(max_grad_norm=0.5)
    before = w.detach().clone()
    opt.step()
    assert torch.equal(before, w) and int(opt.state[w]["step"]) == 0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("update_proj_gap", 0, "update_proj_gap must be"),
        ("update_proj_gap", 2.5, "update_proj_gap must be"),
        ("on_refresh", "kepe", "on_refresh must be one of"),
        ("scale", float("nan"), "scale must be"),
        ("lr", -1.0, "lr must be"),
        ("betas", (0.9,), "betas must be"),
        ("rank", 4, "rank cannot be changed while training"),
        ("state_format", "8bit", "state_format cannot be changed"),
    ],
)
def test_an_edit_that_is_not_valid_is_refused_at_the_next_step(key, value, message):
    opt, w, b = pair()
    give(w, b, 0)
    opt.step()
    opt.param_groups[0][key] = value
    before = w.detach().clone()
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert torch.equal(before, w)


def test_clipping_of_a_method_that_steps_along_the_gradient_is_refused_as_an_edit_too():
    opt, w, b = pair("fira_adamw")
    opt.param_groups[0]["max_grad_norm"] = 1.0
    give(w, b, 0)
    with pytest.raises(ValueError, match="set max_grad_norm=0"):
        opt.step()


def test_a_checkpoint_that_lacks_a_parameter_or_its_state_is_refused():
    opt, w, b = pair()
    give(w, b, 0)
    opt.step()
    saved = opt.state_dict()
    with pytest.raises(ValueError, match="does not fit: it lacks"):
        opt.load_state_dict({**saved, "state": {1: saved["state"][1]}})
    with pytest.raises(ValueError, match="no optimizer checkpoint: it holds param_groups"):
        opt.load_state_dict({"param_groups": saved["param_groups"]})
    groups = [{key: value for key, value in group.items() if key != "params"} for group in saved["param_groups"]]
    with pytest.raises(ValueError, match="no optimizer checkpoint: a group of it says not which parameters"):
        opt.load_state_dict({**saved, "param_groups": groups})


def test_an_older_checkpoint_without_an_option_takes_it_from_the_run():
    opt, w, b = pair(correct_bias=False)
    give(w, b, 0)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    for group in saved["param_groups"]:
        del group["correct_bias"]
    opt.load_state_dict(saved)
    opt.step()
    assert opt.param_groups[0]["correct_bias"] is False


@pytest.mark.parametrize("name, older", [
    ("ldadam", {"proj_type": "std"}),
    ("subtrack_pp_adamw", {"fira_form": "paper"}),
    ("golore_adamw", {"scale": 0.25}),
    ("golore_msgd", {"first_momentum": "damped", "on_refresh": "reset"}),
    ("galore_dominant_adamw", {"proj_type": "left"}),  # another shape of the state, even
])  # fmt: skip
@pytest.mark.parametrize("shape", [(7, 7), (9, 5)])
def test_a_checkpoint_keeps_its_options_where_the_defaults_are_others(name, older, shape):
    def steps(opt, p, seeds):
        for seed in seeds:
            p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            opt.step()

    def made(p, **options):
        fact = {"total_steps": 8} if "golore" in name else {}
        gap = {} if name == "ldadam" else {"update_proj_gap": 3}
        return LowRankOptimizer([{"params": [p], "rank": 2, **gap, **fact, **options}], name, lr=1e-2)

    p = nn.Parameter(torch.ones(shape))
    opt = made(p, **older)
    steps(opt, p, range(2))
    q, saved = nn.Parameter(p.detach().clone()), copy.deepcopy(opt.state_dict())
    resumed = made(q)
    with pytest.warns(UserWarning, match=f"the checkpoint has {next(iter(older.values()))}: the checkpoint's value"):
        resumed.load_state_dict(saved)
    steps(opt, p, range(2, 8))
    steps(resumed, q, range(2, 8))
    assert torch.equal(p, q)
    fresh = nn.Parameter(torch.ones(shape))
    steps(made(fresh), fresh, range(8))
    assert not torch.equal(fresh, p) or (name == "ldadam" and shape == (9, 5))  # the side of square ones alone


def test_another_order_of_the_same_parameters_is_refused():
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    orders = [[("a", net["a"].weight), ("b", net["b"].weight)], [("b", net["b"].weight), ("a", net["a"].weight)]]
    first, second = (LowRankOptimizer([{"params": order, "rank": 2}]) for order in orders)
    with pytest.raises(ValueError, match="other names, or another order"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("name", COVERING)
def test_a_step_inside_autocast_is_a_step_outside(name):
    nets = []
    for inside in (False, True):
        net = models.model()
        opt = models.optimizer(net, name)
        for step in range(4):
            opt.train()
            opt.zero_grad()
            models.loss_of(net, step).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                opt.step()
        nets.append(list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*nets, strict=True))


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("name", ["galore_i3s_adamw_layerwise", "fira_adamw_layerwise"])  # some gradients left, none
def test_a_grad_scaler_is_refused_by_the_layerwise_mode(name, unscaled):
    """Also where it has unscaled before, as torch clips: what the hooks took was scaled still."""
    net = models.model()
    opt = models.optimizer(net, name)
    scaler = torch.amp.GradScaler("cpu")
    opt.train()
    scaler.scale(models.loss_of(net, 0)).backward()
    if unscaled:
        scaler.unscale_(opt)
    with pytest.raises(ValueError, match="GradScaler"):
        scaler.step(opt)
    opt.step()  # without one it goes on


def test_looking_at_the_state_before_the_first_step_does_no_harm():
    opt, w, b = pair()
    assert opt.state[w] == {}
    give(w, b, 0)
    opt.step()
    assert int(opt.state[w]["step"]) == 1


def test_sharing_refreshes_needs_processes():
    with pytest.raises(ValueError, match="torch.distributed"):
        LowRankOptimizer([nn.Parameter(torch.zeros(2))], share_refreshes=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_tensors_in_blocks_equal_small_ones(dtype, monkeypatch):

    finals = []
    for block in (2**20, 512):
        monkeypatch.setattr(kernels, "BLOCK", block)
        gen = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=gen).to(dtype) for shape in ((40, 50), (50, 40), (2, 30, 41), (4500,))]
        params = [nn.Parameter(t) for t in tensors]
        groups = [{"params": params[:3], "rank": 4}, {"params": params[3:], "dense_state_format": "8bit"}]
        opt = LowRankOptimizer(groups, "fira_adamw", lr=1e-2)
        for group in opt.param_groups:
            group["stochastic_rounding"] = False  # the draws of a block are its own
        for seed in range(3):
            gen = torch.Generator().manual_seed(seed)
            for p in params:
                p.grad = torch.randn(p.shape, generator=gen).to(dtype)
            opt.step()
        finals.append(params)
    for a, b in zip(*finals, strict=True):
        # products of blocks add in another order: at most one rounding of the weight
        torch.testing.assert_close(a, b, rtol={torch.bfloat16: 8e-3, torch.float16: 1e-3}.get(dtype, 1e-5), atol=1e-5)
