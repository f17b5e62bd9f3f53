"""Every method that test_equations_of_adam.py leaves out against its paper's equations in float64 (references/).

What a method draws (sampled vectors, random bases, rows) is handed to the reference as it was drawn; whether it was
drawn by the law is tested below. Sketches are drawn anew from their key.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import pytest
import torch
from references.base import Adam, LowRank
from references.compressed import FOAM, GWT
from references.factored import CAME, Adafactor, AdamMini
from references.golore import GoLore
from references.ldadam import ErrorFeedback, LDAdam
from references.momentum import Momentum
from references.natural import NaturalAdam
from references.online import OnlineSubspace
from references.quantized import QGaLore, intervals
from references.rows import rows
from references.scaled import Apollo
from references.sketch import FLora
from references.subtrack import SubTrack
from references.twosided import TwoSided
from streams import NAMES, PLAIN, SQUARE, STACK, TALL, WIDE, displacement, finish, gradients, run, weight, wide
from test_sampling import DRAWS, assert_follows, plackett_luce

from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.methods import registry, resolve
from hf_lowrank.state.formats import FORMATS
from hf_lowrank.state.slots import Buffer, Slot
from hf_lowrank.tensors import random


STEPS, GAP = 16, 5  # four bases
# as in test_equations_of_adam.py: eps and decay would move a run by much more than the tolerance if misplaced
SETTING = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1, "scale": 0.5, "betas": (0.8, 0.95)}
# fp32 moments, products and weights against float64: measured at most 1.4e-6 of the displacement, 4e-6 on both sides
TOLERANCE = 1e-5
SHAPES = [WIDE, TALL, SQUARE, STACK]
OTHERS = [name for name in NAMES if name not in PLAIN and name != "lowrank"]
LEVELS = {0.5: 1, 0.25: 2, 0.125: 3}


def optimizer(p, name, *, called=None, **options):
    """One group of one weight: the setting where the method has it, and options as they come."""
    valid = resolve.complete(name, {k: options[k] for k in (*registry.KINDS, "on_refresh") if k in options})
    usual = {"rank": valid["rank"] if valid["rank"] <= 1 else 3, "total_steps": STEPS, **SETTING}
    if valid.get("update_proj_gap", 1) > 1:
        usual["update_proj_gap"] = GAP
    common = {k: {**usual, **options}[k] for k in ("betas", "eps", "weight_decay", "lr")}
    group = {k: v for k, v in usual.items() if k in valid} | {k: v for k, v in options.items() if k not in common}
    return LowRankOptimizer([{"params": [(called, p)] if called else [p], **group}], name, **common)


# ---- the reference of a group ---------------------------------------------------------------------------------------


class Held:
    """What the optimizer holds of slice i of p, in float64."""

    def __init__(self, p, opt, i=0):
        self.p, self.opt, self.i, self.drawn = p, opt, i, 0

    def __getitem__(self, name):
        raw, group = self.opt.state[self.p], self.opt.param_groups[0]
        slot = Buffer(Slot("m r", "basis"), (min(self.p.shape[-2:]), group["rank"]))
        value = FORMATS["4bit"].decode(raw, name, slot) if f"{name}.absmax" in raw else raw[name]
        value = value[self.i] if self.p.dim() == 3 else value
        return value.double() if value.is_floating_point() else value

    def sketch(self, m, r, number):
        """N(0, 1/r) from the key alone: (use, seed, number of the refresh, m, r)."""
        key = 3, self.opt.param_groups[0]["seed"], number, m, r
        return torch.randn(m, r, generator=random.generator(*key)) * r**-0.5

    def choose(self, subspace):
        """The basis of this refresh as the optimizer has it."""
        if subspace == "rows":
            return rows(lambda G, r: (self["row_index"], self["row_scale"]))
        if subspace == "sketch":
            return lambda G, r, old: self.next_sketch(G.shape[0], r)
        return lambda G, r, old: self["basis"]

    def next_sketch(self, m, r):
        self.drawn += 1
        return self.sketch(m, r, self.drawn - 1).double()


def moments_of(kind, group, by):
    damping = {"absolute": group.get("damping_kind") == "absolute", "on_window": group.get("window")}
    return {
        "adam": Adam,
        "momentum": Momentum,
        "natural_adam": lambda: NaturalAdam(group["history"], group["damping"], **damping),
        "adafactor": lambda: Adafactor(group["decay_rate"], group["clip_threshold"]),
        "came": lambda: CAME(group["beta3"], group["clip_threshold"], group["eps2"]),
        "adam_mini": lambda: AdamMini(by, outside=True),
    }[kind]()


def reference(p, opt, i=0, *, by=None, transposed=None, given=(), **extra):
    """The reference of slice i of p with the options of the group; subspaces in `given` are taken from the optimizer.

    Args:
        p, opt, i: the weight, its optimizer, which matrix of a stack.
        by: what has one second moment in Adam-mini, if not a neuron or a row of R.
        transposed: which side is projected, if not that of proj_type=std.
        given: names of rules whose bases the reference is not to choose for itself.
        extra: fields of the reference.
    """
    group: dict[str, Any] = opt.param_groups[0]
    kinds = ("subspace", "moments", "reconstruction")
    subspace, moments, how = (group.get(kind, getattr(METHODS[group["method"]], kind)) for kind in kinds)
    W, held = (p.detach()[i] if p.dim() == 3 else p.detach()).clone(), Held(p, opt, i)
    flip = W.shape[0] >= W.shape[1] if transposed is None else transposed
    m = W.shape[1] if flip else W.shape[0]
    common = {k: group[k] for k in ("lr", "eps", "weight_decay", "scale", "correct_bias")}
    common |= {"beta1": group["betas"][0], "beta2": group["betas"][1], "transposed": transposed, **extra}
    if subspace == "haar":
        return GWT(W, **{**common, "transposed": False}, level=LEVELS[group["rank"]], limiter=group["limiter"])
    if subspace == "fold":
        fold = {"residual": group["residual_scale"], "square_of_mean": group["fold_of"] == "gradient"}
        return FOAM(W, **{**common, "transposed": False}, level=LEVELS[group["rank"]], **fold)
    rank, gap = min(group["rank"], m), group.get("update_proj_gap", 200)
    if how == "flora":
        adafactor = {"decay": group["decay_rate"], "threshold": group["clip_threshold"]}
        return FLora(W, gap=gap, sketch=lambda k: held.sketch(m, rank, k).T, **adafactor, **common)
    common["rank"] = rank
    if subspace == "block_power" and how == "error_feedback" and gap == 1:
        return LDAdam(W, rho=group["rho"], error_feedback=group["error_feedback"] != "off", **common)
    common = {"gap": gap, "on_refresh": group.get("on_refresh", "keep"), **common}
    common["moments"] = moments_of(moments, group, by or ("column" if flip else "row"))
    if group["proj_type"] == "full":
        right = (
            {}
            if subspace == "dominant"
            else {"choose": held.choose(subspace), "choose_right": lambda *_: held["right_basis"]}
        )
        return TwoSided(W, **right, **common)
    if subspace not in ("dominant", "grassmann", "golore", "lazy", "online") or subspace in given:
        common["choose"] = held.choose(subspace)
    if how == "scaled_gradient":
        scaling = {"by": group["scaling"], "scale_front": group["limit"] == "back", "limiter": group["limiter"]}
        return Apollo(W, **scaling, **common)
    if how == "error_feedback":
        return ErrorFeedback(W, **common)
    common |= {"form": group["fira_form"], "limiter": group["limiter"]} if how == "fira" else {}
    if subspace == "grassmann" and subspace not in given:
        way = {"descending": "descend", "printed": "printed"}[group["direction"]]
        track = {"rule": group["step"], "eta": group["eta"], "accumulate": group["accumulate"], "direction": way}
        return SubTrack(W, **track, **common)
    if subspace == "golore" and subspace not in given:
        switch = ceil(group["switch_at"] * group["total_steps"])
        return GoLore(W, switch=switch, draw=lambda m, r: held["basis"], **common)
    if subspace == "lazy" and subspace not in given:
        lazy = {"threshold": group["threshold"], "keep": group["queue_size"], "cap": group["longest"]}
        return QGaLore(W, store=lambda P: held["basis"], **lazy, **common)
    if subspace == "online":
        common["gap"] = 1 / group["basis_lr"]
        return OnlineSubspace(W, basis_decay=group["basis_weight_decay"], **common)
    return LowRank(W, **common)


def compare(p, opt, stream, *, each=None, **options):
    """Run both side by side and return their distance in units of the displacement, and the references."""
    start = p.detach().clone()
    refs = [reference(p, opt, i, **options) for i in range(p.shape[0] if p.dim() == 3 else 1)]
    for t in run(opt, p, stream):
        for i, ref in enumerate(refs):
            ref.step(stream[t][i] if p.dim() == 3 else stream[t])
        if each:
            each(t, opt.param_groups[0], refs)
    stacked = torch.stack([ref.weight for ref in refs])
    return displacement(stacked if p.dim() == 3 else stacked[0], p, start), refs


def agree(name, shape, *, tolerance=TOLERANCE, stream=None, each=None, called=None, reads=None, **options):
    """Assert that a run of a method with some options equals its reference; return the optimizer and the weight."""
    p = weight(shape)
    opt = optimizer(p, name, called=called, **options)
    distance, refs = compare(p, opt, stream or gradients(shape, STEPS), each=each, **(reads or {}))
    assert distance < tolerance
    return p, opt, refs


# ---- every method ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=["wide", "tall", "square", "stack"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_run_equals_the_papers_equations(name, shape):
    agree(name, shape)


@pytest.mark.parametrize("name", OTHERS)
def test_without_bias_correction_too(name):
    agree(name, WIDE, correct_bias=False)


@pytest.mark.parametrize("name", OTHERS)
def test_edited_options_of_a_group_take_effect(name):
    edits = {"lr": 5e-3, "scale": 0.8, "weight_decay": 0.3, "eps": 3e-2}

    def each(t, group, refs):
        group["initial_lr"] = (
            1e-2  # as torch's schedulers leave it; the basis of Online Subspace Descent follows lr / it
        )
        if t == 3:
            group.update(betas=(0.7, 0.9), **edits)
            for ref in refs:
                vars(ref).update(beta1=0.7, beta2=0.9, **edits)

    agree(name, TALL, each=each)


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


@pytest.mark.parametrize("how", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("name", ["golore_msgd", "galore_i3s_msgd", "galore_hybrid_msgd"])
def test_momentum_sgd(name, how):
    agree(name, TALL, on_refresh=how, **({"r0": 1} if "hybrid" in name else {}))


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
    ("came", {"clip_threshold": 0.5, "beta3": 0.9, "eps2": 1e-3}),
    ("adam_mini", {}),
])  # fmt: skip
@pytest.mark.parametrize("how", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("shape", SHAPES)
def test_small_second_moments(moments, options, how, shape):
    agree(f"galore_dominant_{moments}", shape, on_refresh=how, **options)


@pytest.mark.parametrize("moments", ["adafactor", "came", "adam_mini"])
@pytest.mark.parametrize("family", ["fira", "fira_i3s"])
@pytest.mark.parametrize("form", ["released", "i3s", "paper"])
@pytest.mark.parametrize("shape", [WIDE, TALL, STACK])
def test_small_second_moments_with_every_form_of_fira(moments, family, form, shape):
    agree(f"{family}_{moments}", shape, fira_form=form)


@pytest.mark.parametrize("called", ["layers.0.attn.q_proj.weight", "k_proj.weight"])
@pytest.mark.parametrize("how", ["keep", "rotate"])
def test_adam_mini_has_one_second_moment_per_head_of_queries_and_keys(called, how):
    _, opt, _ = agree("galore_dominant_adam_mini", (12, 6), called=called, head_dim=4, on_refresh=how, reads={"by": 4})
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
    agree(name, shape, proj_type="full", on_refresh=how, tolerance=1e-4 if "dominant" in name else TOLERANCE)


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("proj_type", ["paper", "reverse_std", "left", "right"])
@pytest.mark.parametrize(
    "name",
    [
        "subtrack_adamw",
        "golore_msgd",
        "ldadam",
        "flora_adafactor",
        "grass_adamw",
        "apollo_random_adamw",
        "natural_galore_adamw",
        "galore_dominant_adafactor",
        "galore_dominant_adam_mini",
        "fira_came",
    ],
)
def test_proj_type_chooses_the_side(name, shape, proj_type):
    rows, columns = shape
    transposed = {"paper": rows > columns, "reverse_std": rows < columns, "left": False, "right": True}
    agree(name, shape, proj_type=proj_type, reads={"transposed": transposed[proj_type]})


@pytest.mark.parametrize("name, options", [
    ("subtrack_adamw", {"step": "normalized", "eta": 0.5}),
    ("subtrack_adamw", {"step": "raw", "eta": 5e-3}),
    ("subtrack_adamw", {"accumulate": True}),
    ("subtrack_pp_adamw", {"fira_form": "released"}),
    ("subtrack_pp_adamw", {"on_refresh": "keep"}),
    ("golore_adamw", {"switch_at": 0.2}),
    ("golore_adamw", {"on_refresh": "keep"}),
    ("galore_i3s_msgd", {"on_refresh": "rotate"}),
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


# ---- the row whose parts may be chosen ------------------------------------------------------------------------------


@pytest.mark.parametrize("reconstruction", ["project", "fira", "error_feedback", "scaled_gradient"])
@pytest.mark.parametrize("moments", ["adam", "momentum", "natural_adam", "adafactor", "adam_mini", "came"])
@pytest.mark.parametrize(
    "subspace", ["dominant", "i3s", "golore", "grassmann", "block_power", "lazy", "rows", "sketch"]
)
def test_parts_combine(subspace, moments, reconstruction):
    how = "reset" if subspace == "rows" else "rotate"
    parts = {"subspace": subspace, "moments": moments, "reconstruction": reconstruction}
    options = {"total_steps": STEPS} if subspace == "golore" else {}
    agree("lowrank", TALL, on_refresh=how, reads={"given": subspace}, **parts, **options)


def test_online_subspace_descent_takes_any_moments():
    for moments in ("momentum", "adafactor", "adam_mini", "came"):
        agree("lowrank", WIDE, subspace="online", moments=moments)


# ---- dense parameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("name, moments", [
    ("galore_dominant_adafactor", Adafactor()),
    ("galore_dominant_came", CAME()),
    ("galore_dominant_adam_mini", AdamMini("column", outside=True)),  # one per row of the weight
    ("golore_msgd", Momentum()),
    ("flora_adafactor", Adafactor()),
    ("natural_galore_adamw", Adam()),
    ("foam_adamw", Adam()),
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
    ("galore_dominant_came", "came"),
    ("galore_dominant_adam_mini", "adam"),
    ("golore_msgd", "momentum"),
    ("natural_galore_adamw", "adam"),
    ("foam_adamw", "adam"),
])  # fmt: skip
def test_dense_vectors_are_stepped_by_the_element(name, by_hand):
    p, start, stream = weight((9,)), weight((9,)), [G[0] for G in gradients((5, 9), STEPS)]
    opt = LowRankOptimizer([{"params": [p]}], name, lr=1e-2, eps=1e-2, betas=(0.8, 0.95))
    finish(opt, p, stream)
    W, M, V = start.detach().double(), 0.0, 0.0
    for t, gradient in enumerate(stream, 1):
        G = gradient.double()
        b2 = 1 - t**-0.8 if by_hand == "adafactor" else 0.95
        V = b2 * V + (1 - b2) * G * G
        if by_hand in ("adafactor", "came"):  # not factored, and no confidence
            G = G / V.sqrt()
            G = G / max(1.0, float(G.norm()) / 3)
        M = 0.8 * M + 0.2 * G
        adam = (M / (1 - 0.8**t)) / ((V / (1 - 0.95**t)).sqrt() + 1e-2)
        W = W - 1e-2 * (adam if by_hand == "adam" else M)
    assert displacement(W, p, start) < TOLERANCE


# ---- Q-GaLore -------------------------------------------------------------------------------------------------------


def test_q_galores_intervals_follow_the_overlaps_of_the_subspaces():
    """A gradient that stands still, then one without a memory, then still again; some 30 refreshes of 70 steps."""
    shape = (12, 20)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(t)) for t in range(16)]
    still = gradients(shape, 1)[0]
    stream = [still] * 26 + noise + [still] * 28
    due: list[tuple[int, int]] = []

    def each(t, group, refs):
        due.append((int(opt.state[p]["refresh_at"]), refs[0].due))

    p = weight(shape)
    opt = optimizer(p, "q_galore_adamw", rank=2, update_proj_gap=1)
    distance, [ref] = compare(p, opt, stream, each=each)
    assert distance < TOLERANCE
    assert all(ours == theirs for ours, theirs in due)
    lengths = intervals(ref.overlaps, 1)
    assert max(lengths) >= 4 and any(b < a for a, b in zip(lengths, lengths[1:], strict=False))  # there and back


def test_q_galore_steps_in_the_basis_as_its_four_bits_give_it_back():
    shape, rank = (128, 160), 32  # 4096 numbers: the smallest basis that is packed
    p, opt, [ref] = agree("q_galore_adamw", shape, rank=rank)
    raw = opt.state[p]
    assert raw["basis"].dtype == torch.uint8 and raw["basis"].shape == (128 * rank // 2,)
    P = torch.linalg.svd(gradients(shape, STEPS)[15].double())[0][:, :rank]
    P = P * (P * ref.P).sum(0).sign()
    # half a step of the 15 levels of each block of 128 numbers, four rows of the basis; vectors are exact to 1e-3
    blocks = P.reshape(-1, 128)
    error = (ref.P.reshape(-1, 128) - blocks).abs().amax(1)
    assert (error <= blocks.abs().amax(1) / 14 + 1e-3).all()


# ---- LDAdam ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("gap", [1, 3])
def test_ldadams_error_feedback_loses_nothing(shape, gap):
    """sum_s P_s M_s + b1 / (1 - b1) P_t M_t + E_t = sum_s G_s, which V has no part in."""
    p = weight(shape)
    opt = optimizer(p, "ldadam", rank=2, update_proj_gap=gap)
    taken = seen = 0.0
    stream, held = gradients(shape, 20), Held(p, opt)
    for t in run(opt, p, stream):
        PM = held["basis"] @ held["exp_avg"]
        taken, seen = taken + PM, seen + wide(stream[t]).double()
        total = taken + 0.8 / 0.2 * PM + held["error"]
        assert (total - seen).norm() < 1e-6 * (t + 1) * stream[t].norm()  # fp32, added up over the steps


@pytest.mark.parametrize("form, loss", [("bf16", 2**-9), ("8bit", 0.012)])  # see test_formats.py
def test_an_error_in_fewer_bits_loses_its_rounding_and_no_more(form, loss):
    shape = (64, 80)  # 5120 numbers: enough to be kept in 8 bits
    p = weight(shape)
    opt = optimizer(p, "ldadam", rank=8, error_feedback=form)
    taken = seen = bound = 0.0
    stream, held = gradients(shape, STEPS), Held(p, opt)
    for t in run(opt, p, stream):
        PM, E = (
            held["basis"] @ held["exp_avg"],
            FORMATS[form].decode(opt.state[p], "error", Buffer(Slot("m n"), shape)).double(),
        )
        taken, seen, bound = taken + PM, seen + stream[t].double(), bound + loss * E.norm()
        lost = (taken + 0.8 / 0.2 * PM + E - seen).norm()
        assert 0.01 * bound < lost < bound


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_with_error_feedback_low_rank_momentum_moves_the_weight_as_full_momentum_does_in_the_end(shape):
    """The same identity seen from the weight: V held at 1 is moments=momentum."""
    p, parts = weight(shape), {"subspace": "block_power", "moments": "momentum", "reconstruction": "error_feedback"}
    opt = optimizer(p, "lowrank", **parts, rank=2, on_refresh="rotate", update_proj_gap=1, weight_decay=0.0, scale=1.0)
    start, stream, held = p.detach().double(), gradients(shape, 20), Held(p, opt)
    finish(opt, p, stream)
    moved = wide(start - p.detach().double()) / 1e-2
    total = moved + 0.8 / 0.2 * held["basis"] @ held["exp_avg"] + held["error"]
    seen = wide(sum(stream)).double()
    assert (total - seen).norm() < 1e-5 * seen.norm()


# ---- SubTrack -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["subtrack_adamw", "subtrack_pp_adamw"])
@pytest.mark.parametrize("drift", [0.1, 3.0])
def test_subtracks_line_search_never_loses_energy(shape, name, drift):
    p = weight(shape)
    opt = optimizer(p, name, rank=2, update_proj_gap=1)
    stream = gradients(shape, 20, drift=drift)
    before, gained = None, 0.0
    for t in run(opt, p, stream):
        G, P = wide(stream[t]).double(), opt.state[p]["basis"].double()
        if before is not None:
            old, new = ((Q.mT @ G).square().sum((-2, -1)) for Q in (before, P))
            assert (new >= old * (1 - 1e-6)).all()  # fp32 bases
            gained = max(gained, float((new / old).max()))
        assert (P.mT @ P - torch.eye(2)).abs().max() < 1e-5
        before = P
    assert gained > 1.001


@pytest.mark.parametrize("step", ["auto", "normalized"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_scaling_the_gradients_leaves_subtracks_bases(step, accumulate):
    bases = {}
    for size in (1.0, 1000.0):
        p = weight(TALL)
        opt = optimizer(p, "subtrack_adamw", step=step, eta=0.3, accumulate=accumulate)
        bases[size] = [opt.state[p]["basis"].clone() for _ in run(opt, p, [size * G for G in gradients(TALL, STEPS)])]
    for a, b in zip(*bases.values(), strict=True):
        assert (a - b).abs().max() < 1e-5  # 1000 is no power of two: the last bits differ
    assert (bases[1.0][0] - bases[1.0][-1]).norm() > 1e-2


# ---- Natural GaLore -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind, damping", [("relative", 0.1), ("absolute", 30.0)])
def test_natural_galores_solve_is_the_dense_solve(shape, kind, damping):
    """With b1 = 0 the first moment is F^-1 g itself."""
    p, stream = weight(shape), gradients(shape, 7)
    opt = optimizer(
        p, "natural_galore_adamw", damping_kind=kind, damping=damping, update_proj_gap=100, betas=(0.0, 0.9)
    )
    for t in run(opt, p, stream):
        P = opt.state[p]["basis"].double()
        H = torch.stack([(P.mT @ wide(G).double()).flatten(-2) for G in stream[max(0, t - 3) : t + 1]], -1)
        gram = H.mT @ H
        share = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] if kind == "relative" else 1.0
        F = damping * share * torch.eye(H.shape[-2]) + H @ H.mT
        natural = torch.linalg.solve(F, H[..., -1:]).squeeze(-1)
        assert (opt.state[p]["exp_avg"].double().flatten(-2) - natural).norm() < 1e-5 * natural.norm()


def test_relative_damping_does_not_see_the_size_of_the_gradients():
    runs = {}
    for kind, damping in (("relative", 0.1), ("absolute", 1.0)):
        for size in (1.0, 1000.0):
            p = weight(TALL)
            opt = optimizer(p, "natural_galore_adamw", damping_kind=kind, damping=damping, eps=1e-12)
            runs[kind, size] = finish(opt, p, [size * G for G in gradients(TALL, STEPS)])
    start = weight(TALL)
    assert displacement(runs["relative", 1.0], runs["relative", 1000.0], start) < TOLERANCE
    assert displacement(runs["absolute", 1.0], runs["absolute", 1000.0], start) > 1e-2


# ---- GWT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 16), (7, 13)])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_gwts_transform_is_orthogonal(shape, level):
    """Where all denominators are one number the step is the inverse transform of the transform: G itself."""
    p, [G] = weight(shape), gradients(shape, 1)
    start = p.detach().clone()
    options = {"lr": 1.0, "eps": 1e6, "betas": (0.0, 0.5), "weight_decay": 0.0, "scale": 1e6, "correct_bias": False}
    finish(optimizer(p, "gwt_adamw", rank=2.0**-level, **options), p, [G])
    assert (start - p.detach() - G).norm() < 1e-5 * G.norm()


# ---- Grass ----------------------------------------------------------------------------------------------------------

ROW_NORMS = torch.tensor([4.0, 3.0, 2.0, 1.0])


def drawn_rows(rule, r):
    """Row indices and scales (DRAWS, r) of one refresh of DRAWS equal matrices with these norms of the rows."""
    gen = torch.Generator().manual_seed(3)
    G = torch.randn(4, 6, generator=gen)
    G = G / G.norm(dim=1, keepdim=True) * ROW_NORMS[:, None]
    p = torch.nn.Parameter(torch.zeros(DRAWS, 4, 6))
    opt = optimizer(p, "grass_adamw", rank=r, rows=rule)
    finish(opt, p, [G.expand(DRAWS, 4, 6)])
    return opt.state[p]["row_index"], opt.state[p]["row_scale"]


@pytest.mark.parametrize("rule, weights", [("norm", [4, 3, 2, 1]), ("uniform", [1, 1, 1, 1])])
def test_grass_draws_with_replacement_by_the_law_and_without_bias(rule, weights):
    index, scale = drawn_rows(rule, 1)
    assert_follows(index, plackett_luce([float(w) for w in weights], 1))
    index, scale = drawn_rows(rule, 2)
    assert (index[:, 0] == index[:, 1]).any()  # a row may come twice
    q = torch.tensor(weights) / sum(weights)
    torch.testing.assert_close(scale, (2 * q[index]).rsqrt())
    kept = torch.zeros(DRAWS, 4).scatter_add_(1, index, scale.square())  # the diagonal of P P^T
    assert ((kept.mean(0) - 1).abs() <= 5 * kept.std(0) / DRAWS**0.5).all()


@pytest.mark.parametrize("rule, weights", [("norm_without", [4, 3, 2, 1]), ("uniform_without", [1, 1, 1, 1])])
def test_grass_draws_without_replacement_by_the_law(rule, weights):
    index, scale = drawn_rows(rule, 2)
    assert_follows(index, plackett_luce([float(w) for w in weights], 2))
    assert (scale == 1).all()


def test_grass_takes_the_largest_rows():
    index, scale = drawn_rows("top", 2)
    assert (index == torch.tensor([0, 1])).all() and (scale == 1).all()


# ---- sketches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flora_adafactor", "apollo_random_adamw", "apollo_mini_adamw"])
@pytest.mark.parametrize("at", [3, 5, 7])
def test_a_sketch_is_no_state_and_a_resumed_run_draws_the_same(name, at):
    stream = gradients(WIDE, STEPS)
    whole, cut = weight(WIDE), weight(WIDE)
    finish(optimizer(whole, name), whole, stream)
    first = optimizer(cut, name)
    finish(first, cut, stream[:at])
    assert not any(value.shape[-2:] in ((6, 3), (6, 1)) for value in first.state[cut].values())
    again = torch.nn.Parameter(cut.detach().clone())
    second = optimizer(again, name)
    second.load_state_dict(first.state_dict())
    assert torch.equal(finish(second, again, stream[at:]), whole)


# ---- published packages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("scaling, scale", [("channel", 1.0), ("tensor", 128.0)])
@pytest.mark.parametrize("limit", ["back", "front"])
def test_apollo_is_apollo_torchs(shape, scaling, scale, limit):
    apollo_torch = pytest.importorskip("apollo_torch")
    stream = gradients(shape, STEPS)
    stream[7] = 50 * stream[7]  # the limiter acts
    p, q = weight(shape), torch.nn.Parameter(weight(shape).detach().double())
    group = {"params": [q], "rank": 3, "update_proj_gap": STEPS, "scale": scale, "proj": "svd", "proj_type": "std"}
    theirs = apollo_torch.APOLLOAdamW(
        [{**group, "scale_type": scaling}], lr=1e-2, eps=0.0, scale_front=limit == "back"
    )
    # one basis, since their signs jump at a refresh; no eps, since theirs is added before the bias correction; no
    # decay, since theirs shrinks the fresh update too
    options = {"scaling": scaling, "scale": scale, "limit": limit, "eps": 1e-30, "weight_decay": 0.0}
    options["update_proj_gap"] = STEPS
    finish(optimizer(p, "apollo_dominant_adamw", **options, betas=(0.9, 0.999)), p, stream)
    start = weight(shape)
    assert displacement(finish(theirs, q, stream), p, start) < TOLERANCE


@pytest.mark.parametrize("shape, called", [(WIDE, "mlp"), (TALL, "mlp"), (SQUARE, "mlp"), ((12, 6), "q_proj")])
def test_adam_mini_on_an_identity_basis_is_adam_minis(shape, called):
    """All rows of Grass's top rule in their order are an identity basis."""
    adam_mini = pytest.importorskip("adam_mini")
    stream, p, q = gradients(shape, STEPS), weight(shape), torch.nn.Parameter(weight(shape).detach().double())
    heads = {"dim": 2 * shape[1], "n_heads": 2 * shape[1]} if called == "q_proj" else {}  # blocks of two rows
    options = {"lr": 1e-2, "eps": 1e-2, "weight_decay": 0.1}
    theirs = adam_mini.Adam_mini([(called, q)], betas=(0.8, 0.95), verbose=False, **options, **heads)
    parts = {"subspace": "rows", "moments": "adam_mini", "rows": "top", "on_refresh": "keep"}
    ours = optimizer(p, "lowrank", called=f"{called}.weight", rank=min(shape), **parts, scale=1.0, head_dim=2)
    finish(ours, p, stream)
    assert displacement(finish(theirs, q, stream), p, weight(shape)) < TOLERANCE


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
def test_came_on_an_identity_basis_is_came_pytorchs(shape):
    came_pytorch = pytest.importorskip("came_pytorch")
    stream, p, q = gradients(shape, STEPS), weight(shape), torch.nn.Parameter(weight(shape).detach().double())
    theirs = came_pytorch.CAME([q], lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95, 0.9999))
    parts = {"subspace": "rows", "moments": "came", "rows": "top", "on_refresh": "keep"}
    finish(optimizer(p, "lowrank", rank=min(shape), **parts, scale=1.0), p, stream)
    assert displacement(finish(theirs, q, stream), p, weight(shape)) < TOLERANCE
