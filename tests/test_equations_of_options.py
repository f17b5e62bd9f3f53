"""Every option of every method against the equations that it stands for (references/)."""

from __future__ import annotations

import pytest
import torch
from comparing import GAP, SETTING, STEPS, TOLERANCE, agree, optimizer
from streams import SQUARE, STACK, TALL, WIDE, displacement, finish, gradients, weight
from torch.optim import lr_scheduler


SHAPES = [WIDE, TALL, SQUARE, STACK]


# ---- Adam, Fira -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["keep", "rotate", "rotate_variance", "rotate_variance_complete", "reset"])
@pytest.mark.parametrize("name", ["galore_dominant_adamw", "galore_i3s_adamw", "fira_i3s_adamw"])
def test_moments_are_transported_as_the_papers_say(name, how):
    stream = gradients(TALL, STEPS, drift=0.3)
    start, end = weight(TALL), agree(name, TALL, stream=stream, on_refresh=how)[0]
    kept = weight(TALL)
    finish(optimizer(kept, name, on_refresh="keep"), kept, stream)
    # the stream tells the rules apart: they differ by a thousand tolerances
    assert how == "keep" or displacement(kept, end, start) > 1000 * TOLERANCE


@pytest.mark.parametrize("shape, rank", [(WIDE, 3), (TALL, 3), (SQUARE, 7), (STACK, 2)])
@pytest.mark.parametrize("form", ["released", "i3s", "paper"])
@pytest.mark.parametrize("eps", [1e-8, SETTING["eps"]])  # the papers' is the optimizer's in `paper`, else 1e-8
def test_every_form_of_fira_equals_its_print(form, shape, rank, eps):
    _, _, refs = agree("fira_adamw", shape, rank=rank, fira_form=form, eps=eps)
    if shape == STACK:  # the limiter acted at some steps and let others through
        assert {True, False} <= {acted for ref in refs for acted in ref.limited}


EPS = [
    "galore_dominant_adamw",
    "fira_adamw",
    "ldadam",
    "natural_galore_adamw",
    "galore_dominant_adam_mini",
    "gwt_adamw",
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", ["torch", "released"])
@pytest.mark.parametrize("name", [*EPS, "foam_adamw"])
def test_eps_is_added_where_the_option_says(name, place, shape):
    agree(name, shape, eps_place=place)


@pytest.mark.parametrize("name", EPS)
def test_without_bias_correction_there_is_one_place_for_eps(name):
    ends = []
    for place in ("torch", "released"):
        p = weight(TALL)
        ends.append(finish(optimizer(p, name, eps_place=place, correct_bias=False), p, gradients(TALL, STEPS)))
    assert torch.equal(*ends)


# ---- every option of every method -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("step, eta, direction", [
    ("auto", 1.0, "descending"),
    ("normalized", 0.5, "descending"),  # angles of the order of 0.1
    ("normalized", 0.5, "printed"),
    ("raw", 5e-3, "descending"),  # squared gradients are of the order of 100
    ("raw", 5e-3, "printed"),
])  # fmt: skip
def test_subtrack(shape, accumulate, step, eta, direction):
    options = {"step": step, "eta": eta, "accumulate": accumulate, "direction": direction}
    agree("subtrack_adamw", shape, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["released", "i3s", "paper"])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate": True}, {"on_refresh": "rotate_variance_complete"}, {"on_refresh": "reset"}]
)
def test_subtrack_pp_with_every_form_of_fira(shape, form, options):
    agree("subtrack_pp_adamw", shape, fira_form=form, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["golore_adamw", "golore_msgd"])
@pytest.mark.parametrize("switch_at", [0.0, 0.2, 0.5, 0.625, 1.0])  # from step 0, 4, 8, 10: the bases of 0, 5, 10, 10
def test_golore_switches_inside_the_run(shape, name, switch_at):
    agree(name, shape, switch_at=switch_at)


@pytest.mark.parametrize("first", ["damped", "gradient"])
@pytest.mark.parametrize("how", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("name", ["golore_msgd", "galore_i3s_msgd", "galore_hybrid_msgd"])
def test_momentum_sgd(name, how, first):
    agree(name, TALL, on_refresh=how, first_momentum=first, **({"r0": 1} if "hybrid" in name else {}))


@pytest.mark.parametrize("shape", [WIDE, TALL, STACK])
@pytest.mark.parametrize("kind, damping", [("relative", 0.1), ("relative", 1.0), ("absolute", 1e-3)])
@pytest.mark.parametrize("window", ["rotate", "clear"])
@pytest.mark.parametrize("how", ["keep", "rotate_variance", "reset"])
def test_natural_galore(shape, kind, damping, window, how):
    options = {"damping_kind": kind, "damping": damping, "window": window, "on_refresh": how, "history": 3}
    # gradients of a norm of 0.1 to 0.3, so that the condition number 1 + |H|^2 / damping of the solve is some 100
    agree("natural_galore_adamw", shape, stream=[0.01 * G for G in gradients(shape, STEPS)], **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options", [{"rho": 0.5}, {"error_feedback": "off"}, {"rank": 6}, {"error_feedback": "off", "rho": 0.0}]
)
def test_ldadam(shape, options):
    agree("ldadam", shape, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["rotate", "rotate_variance", "reset"])
def test_ldadams_error_feedback_between_refreshes_that_are_rare(shape, how):
    agree("ldadam", shape, update_proj_gap=GAP, on_refresh=how)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{"clip_threshold": 0.5}, {"decay_rate": 0.5}, {"rank": 6}])
def test_flora(shape, options):
    agree("flora_adafactor", shape, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", ["norm", "top", "norm_without", "uniform", "uniform_without"])
def test_grass(shape, rule):
    agree("grass_adamw", shape, rows=rule)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{"basis_lr": 0.1}, {"basis_lr": 0.02, "basis_weight_decay": 0.5}])
def test_online_subspace_descent(shape, options):
    agree("online_subspace_adamw", shape, **options)


def test_the_basis_of_online_subspace_descent_follows_the_schedule():
    def each(t, group, refs):
        group["initial_lr"] = 1e-2
        group["lr"] = refs[0].lr = 1e-2 * (1 - t / STEPS)

    agree("online_subspace_adamw", TALL, each=each, basis_lr=0.1)


@pytest.mark.parametrize("schedule", ["OneCycleLR", "CyclicLR"])
def test_it_never_moves_faster_than_at_the_peak(schedule):
    """OneCycleLR begins at a 25th of its peak, CyclicLR at its least: `initial_lr` is neither's peak."""
    p = weight(TALL)
    opt = optimizer(p, "online_subspace_adamw", rank=3, basis_lr=0.01)
    made = (
        lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=STEPS, cycle_momentum=False)
        if schedule == "OneCycleLR"
        else lr_scheduler.CyclicLR(opt, base_lr=1e-4, max_lr=1e-2, step_size_up=2, cycle_momentum=False)
    )
    before = None
    for G in gradients(TALL, STEPS):
        p.grad = G
        opt.step()
        made.step()
        P = opt.state[p]["basis"].clone()
        if before is not None:  # steps of Adam's have about the size of its rate
            assert float((P - before).abs().max()) < 0.01 * 1.5
        before = P


def test_a_rate_of_zero_stops_the_basis_too():
    p = weight(TALL)
    opt = optimizer(p, "online_subspace_adamw", rank=3, lr=0.0)
    first, *others = gradients(TALL, 4)
    finish(opt, p, [first])
    before = opt.state[p]["basis"].clone()
    finish(opt, p, others)
    assert torch.equal(before, opt.state[p]["basis"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "name, rank", [("apollo_random_adamw", 3), ("apollo_dominant_adamw", 3), ("apollo_mini_adamw", 1)]
)
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("limit", ["back", "front"])
def test_apollo(shape, name, rank, scaling, limit):
    def each(t, group, refs):  # where the scale stands shows when it changes
        if t == 8:
            group["scale"] *= 4
            for ref in refs:
                ref.scale *= 4

    _, _, refs = agree(name, shape, each=each, rank=rank, scaling=scaling, limit=limit, limiter=1.1)
    assert {True, False} <= {acted for ref in refs for acted in ref.limited}


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 8), (3, 13), (2, 5, 9)])
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("name, options", [
    ("gwt_adamw", {}),
    ("gwt_adamw", {"limiter": 1.5}),
    ("foam_adamw", {}),
    ("foam_adamw", {"residual_scale": 0.3}),
    ("foam_adamw", {"fold_of": "gradient"}),
])  # fmt: skip
def test_compression_of_the_last_axis(shape, level, name, options):
    agree(name, shape, rank=2.0**-level, **options)


@pytest.mark.parametrize("moments, options", [
    ("adafactor", {"clip_threshold": 0.5, "decay_rate": 0.5}),
    ("adafactor", {"clip_threshold": 0.5, "clip_at": "step"}),
    ("came", {"clip_threshold": 0.5, "beta3": 0.9, "eps2": 1e-3}),
    ("adam_mini", {}),
])  # fmt: skip
@pytest.mark.parametrize("how", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_second_moments(moments, options, how, shape):
    agree(f"galore_dominant_{moments}", shape, on_refresh=how, **options)


@pytest.mark.parametrize("moments", ["adafactor", "came", "adam_mini"])
@pytest.mark.parametrize("form", ["released", "i3s", "paper"])
@pytest.mark.parametrize("shape", [WIDE, TALL, STACK])
def test_small_second_moments_with_every_form_of_fira(moments, form, shape):
    parts = {"moments": moments, "reconstruction": "fira", "on_refresh": "keep"}
    agree("lowrank", shape, fira_form=form, **parts)


@pytest.mark.parametrize("called", ["layers.0.attn.q_proj.weight", "k_proj.weight"])
@pytest.mark.parametrize("how", ["keep", "rotate"])
def test_adam_mini_has_one_second_moment_per_head_of_queries_and_keys(called, how):
    _, opt, _ = agree("galore_dominant_adam_mini", (12, 6), called=called, head_dim=4, on_refresh=how)
    assert next(iter(opt.state.values()))["block_sq"].shape == (3,)


@pytest.mark.parametrize(
    "shape, called", [((12, 6), "v_proj.weight"), ((6, 12), "q_proj.weight"), ((11, 6), "q_proj.weight")]
)
def test_adam_mini_has_no_heads_elsewhere_nor_where_outputs_are_mixed_nor_where_they_do_not_divide(shape, called):
    agree("galore_dominant_adam_mini", shape, called=called, head_dim=4)


@pytest.mark.parametrize("name", ["galore_dominant_adamw", "galore_i3s_adamw", "galore_i3s_msgd"])
@pytest.mark.parametrize("how", ["keep", "rotate", "reset", "rotate_variance"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_sides(name, how, shape):
    if how == "rotate_variance" and "msgd" in name:
        pytest.skip("has no variance")
    # where both bases are those of one gradient R = P^T G Q is diagonal: its other entries are fp32 noise, 1e-6, which
    # eps divides by 1e-2
    agree(name, shape, proj_type="full", on_refresh=how, tolerance=1e-4 if "adamw" in name else TOLERANCE)


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("proj_type", ["std", "paper", "reverse_std", "left", "right"])
@pytest.mark.parametrize(
    "name",
    [
        "galore_dominant_adamw",
        "fira_adamw",
        "subtrack_adamw",
        "golore_msgd",
        "ldadam",
        "flora_adafactor",
        "grass_adamw",
        "apollo_random_adamw",
        "natural_galore_adamw",
        "galore_dominant_adafactor",
        "galore_dominant_adam_mini",
    ],
)
def test_proj_type_chooses_the_side(name, shape, proj_type):
    agree(name, shape, proj_type=proj_type)


@pytest.mark.parametrize("name, options", [
    *((name, {"eps_place": "released"}) for name in [*EPS, "foam_adamw"]),
    ("subtrack_adamw", {"step": "normalized", "eta": 0.5}),
    ("subtrack_adamw", {"step": "raw", "eta": 5e-3}),
    ("subtrack_adamw", {"accumulate": True}),
    ("subtrack_pp_adamw", {"fira_form": "i3s"}),
    ("subtrack_pp_adamw", {"fira_form": "paper"}),
    ("subtrack_pp_adamw", {"on_refresh": "keep"}),
    ("golore_adamw", {"switch_at": 0.2}),
    ("golore_adamw", {"on_refresh": "keep"}),
    ("golore_msgd", {"first_momentum": "damped"}),
    ("galore_i3s_msgd", {"first_momentum": "gradient"}),
    ("galore_i3s_msgd", {"on_refresh": "keep"}),
    ("galore_hybrid_msgd", {"r0": 0}),
    ("natural_galore_adamw", {"damping": 1.0}),
    ("natural_galore_adamw", {"damping_kind": "absolute"}),
    ("natural_galore_adamw", {"window": "clear"}),
    ("natural_galore_adamw", {"history": 2}),
    ("ldadam", {"rho": 0.5}),
    ("ldadam", {"error_feedback": "off"}),
    ("flora_adafactor", {"decay_rate": 0.5}),
    ("flora_adafactor", {"clip_threshold": 0.5}),
    ("grass_adamw", {"rows": "top"}),
    ("grass_adamw", {"rows": "norm_without"}),
    ("grass_adamw", {"rows": "uniform"}),
    ("grass_adamw", {"rows": "uniform_without"}),
    ("online_subspace_adamw", {"basis_lr": 0.1}),
    ("online_subspace_adamw", {"basis_weight_decay": 0.5}),
    ("apollo_random_adamw", {"scaling": "tensor"}),
    ("apollo_random_adamw", {"limiter": 1.1}),
    ("gwt_adamw", {"rank": 0.5}),
    ("gwt_adamw", {"limiter": 1.5}),
    ("foam_adamw", {"rank": 0.5}),
    ("foam_adamw", {"residual_scale": 0.3}),
    ("foam_adamw", {"fold_of": "gradient"}),
    ("galore_dominant_adafactor", {"decay_rate": 0.5}),
    ("galore_dominant_adafactor", {"clip_threshold": 0.5}),
    ("galore_dominant_adafactor", {"clip_at": "step"}),
    ("galore_dominant_came", {"beta3": 0.9}),
    ("galore_dominant_came", {"eps2": 1e-3}),
    ("galore_dominant_adam_mini", {"on_refresh": "rotate"}),
    ("galore_dominant_adamw", {"proj_type": "full"}),
])  # fmt: skip
def test_the_streams_tell_the_options_apart(name, options):
    """Else the comparisons above would show nothing: every option moves a run by a hundred tolerances at least."""
    start, ends = weight(WIDE), []
    for chosen in ({}, options):
        p = weight(WIDE)
        ends.append(finish(optimizer(p, name, **chosen), p, gradients(WIDE, STEPS)))
    assert displacement(*ends, start) > 100 * TOLERANCE
