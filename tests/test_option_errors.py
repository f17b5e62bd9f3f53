"""Options and parameters that cannot be meant are refused in one sentence, with what is valid."""

from __future__ import annotations

import re

import pytest
import torch
from streams import (
    COVERING,
    NAMES,
    PLAIN,
    WIDE,
    finish,
    gradients,
    optimizer,
    weight,
)

from hf_lowrank import METHODS, LowRankOptimizer, param_groups
from hf_lowrank.methods import resolve
from hf_lowrank.observe.describe import summary


NAN, INF = float("nan"), float("inf")


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("rank", [3, None])
def test_sparse_gradients_are_refused_before_anything_moves(name, rank):
    p, other = weight(WIDE), weight(WIDE)
    opt = optimizer([other, p], name, rank=rank)
    p.grad, other.grad = torch.zeros(WIDE).to_sparse(), torch.ones(WIDE)
    with pytest.raises(ValueError, match="sparse"):
        opt.step()
    assert torch.equal(other, weight(WIDE))


def test_a_rate_that_lies_on_an_accelerator_is_refused_for_it_would_be_waited_for():
    with pytest.raises(ValueError, match="lr lies on meta, and every step would wait"):
        optimizer(weight(WIDE), "galore_i3s_adamw", lr=torch.tensor(1e-2, device="meta"))
    ends = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        p = weight(WIDE)
        p.grad = torch.ones(WIDE)
        optimizer(p, "galore_i3s_adamw", lr=lr).step()
        ends.append(p.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_number_formats_are_refused_by_name(rank, dtype):
    p = torch.nn.Parameter(torch.zeros(WIDE, dtype=dtype))
    with pytest.raises(ValueError, match=str(dtype)):
        optimizer(p, "galore_dominant_adamw", rank=rank)


@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4, 5), (0, 4)])
def test_only_matrices_and_stacks_of_them_are_projected(shape):
    with pytest.raises(ValueError, match="rank"):
        optimizer(torch.nn.Parameter(torch.zeros(shape)), "galore_dominant_adamw")
    optimizer(torch.nn.Parameter(torch.zeros(shape)), "galore_dominant_adamw", rank=None)


def test_a_parameter_in_two_groups_is_refused_and_nothing_is_added():
    p = weight(WIDE)
    opt = optimizer(p, "galore_dominant_adamw")
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [p]})
    with pytest.raises(ValueError, match="only matrices"):
        opt.add_param_group({"params": [weight((5,))], "rank": 2})
    assert len(opt.param_groups) == 1


ZERO_UP = r"(>= 0|\[0, inf\))"
BAD = [
    ("lr", -1e-3, ZERO_UP),
    ("lr", NAN, ZERO_UP),
    ("lr", INF, ZERO_UP),
    ("lr", "fast", ZERO_UP),
    ("lr", None, ZERO_UP),
    ("eps", -1.0, ZERO_UP),
    ("eps", NAN, ZERO_UP),
    ("eps", "small", ZERO_UP),
    ("weight_decay", -0.1, ZERO_UP),
    ("weight_decay", INF, ZERO_UP),
    ("weight_decay", "some", ZERO_UP),
    ("betas", (0.9, 1.0), r"\[0, 1\)"),
    ("betas", (-0.1, 0.9), r"\[0, 1\)"),
    ("betas", (NAN, 0.9), r"\[0, 1\)"),
    ("betas", (0.9,), r"\[0, 1\)"),
    ("betas", (0.9, 0.99, 0.999), r"\[0, 1\)"),
    ("betas", 0.9, r"\[0, 1\)"),
    ("betas", ("high", 0.9), r"\[0, 1\)"),
    ("betas", None, r"\[0, 1\)"),
    ("rank", 0, "integer >= 1"),
    ("rank", -4, "integer >= 1"),
    ("rank", 2.5, "integer >= 1"),
    ("rank", NAN, "integer >= 1"),
    ("rank", INF, "integer >= 1"),
    ("rank", "many", "integer >= 1"),
    ("rank", True, "integer >= 1"),
    ("rank", None, "integer >= 1"),
    ("update_proj_gap", 0, "integer >= 1"),
    ("update_proj_gap", -5, "integer >= 1"),
    ("update_proj_gap", 2.5, "integer >= 1"),
    ("update_proj_gap", NAN, "integer >= 1"),
    ("update_proj_gap", "often", "integer >= 1"),
    ("update_proj_gap", None, "integer >= 1"),
    ("scale", 0.0, "> 0"),
    ("scale", -1.0, "> 0"),
    ("scale", NAN, "> 0"),
    ("scale", INF, "> 0"),
    ("scale", "large", "> 0"),
    ("proj_type", "both", "std, paper, reverse_std, left, right"),
    ("on_refresh", "forget", "keep, rotate"),
    ("stagger", "perhaps", "true, false or auto"),
    ("layerwise", "perhaps", "true, false or offload"),
    ("stagger", 2, "true, false or auto"),
    ("correct_bias", "maybe", "true or false"),
    ("seed", -1, "integer >= 0"),
    ("seed", "dice", "integer >= 0"),
]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("option, value, valid", BAD)
def test_a_bad_value_is_refused_with_what_is_valid(name, option, value, valid):
    with pytest.raises(ValueError, match=f"(?s){option}.*{valid}"):
        LowRankOptimizer([{"params": [weight(WIDE)], "rank": 3, option: value}], name)


@pytest.mark.parametrize(
    "option, value, valid", [case for case in BAD if case[0] in ("lr", "eps", "weight_decay", "betas")]
)
def test_a_bad_value_is_refused_for_dense_groups_and_as_an_argument_too(option, value, valid):
    with pytest.raises(ValueError, match=f"(?s){option}.*{valid}"):
        LowRankOptimizer([{"params": [weight(WIDE)], option: value}], "galore_dominant_adamw")
    with pytest.raises(ValueError, match=f"(?s){option}.*{valid}"):
        LowRankOptimizer([weight(WIDE)], "galore_dominant_adamw", **{option: value})


@pytest.mark.parametrize("name, option, value, valid", [
    ("galore_dominant_adamw", "refresh", "magic", "gram, svd, randomized, power"),
    ("galore_i3s_adamw", "refresh", "randomized", "gram, svd"),
    ("galore_i3s_adamw", "refresh", "power", "gram, svd"),
    ("galore_hybrid_adamw", "r0", -1, "integer >= 0"),
    ("galore_hybrid_adamw", "r0", "half", "integer >= 0"),
    ("fira_adamw", "limiter", 1.0, "> 1"),
    ("fira_adamw", "limiter", NAN, "> 1"),
    ("fira_adamw", "fira_form", "other", "released, i3s, paper"),
    ("lowrank", "subspace", "dominnat", "alice, block_power, dominant, golore, grass_walk, grassmann, hybrid, i3s"),
    ("lowrank", "moments", "atom", "adafactor, adalomo, adam"),
    ("lowrank", "reconstruction", "fire", "compensation, error_feedback, fira, frugal, project, residual"),
])  # fmt: skip
def test_a_bad_value_of_a_part_is_refused_with_what_is_valid(name, option, value, valid):
    with pytest.raises(ValueError, match=f"{option}.*{valid}"):
        LowRankOptimizer([{"params": [weight(WIDE)], "rank": 3, option: value}], name)


@pytest.mark.parametrize("parts, reason", [
    ({"moments": "adafactor", "reconstruction": "error_feedback"}, "against gradients.*moments=momentum or adam"),
    ({"moments": "natural_adam", "subspace": "block_power"}, "against gradients.*moments=momentum or adam"),
    ({"moments": "racs", "reconstruction": "error_feedback"}, "moments must be one of"),
    ({"moments": "sgd", "reconstruction": "error_feedback"}, "keep none: choose moments=momentum or adam"),
    ({"subspace": "sketch", "reconstruction": "error_feedback"}, "not orthonormal: choose another.*subspace=dominant"),
    ({"subspace": "sketch", "reconstruction": "frugal"}, "not orthonormal"),
    ({"subspace": "rows", "reconstruction": "compensation"}, "not orthonormal"),
    ({"reconstruction": "frugal", "basis_format": "4bit"}, "a basis in 4bit leaves out.*use basis_format=fp32"),
    ({"reconstruction": "compensation", "basis_format": "bf16"}, "a basis in bf16 leaves out"),
    ({"subspace": "rows", "rows": "top", "reconstruction": "compensation"}, None),
    ({"subspace": "sketch", "reconstruction": "error_feedback", "error_feedback": "off"}, None),
])  # fmt: skip
def test_parts_that_step_uphill_together_are_refused(parts, reason):
    """They ran, with a residual that is none, or with errors in units of normalised updates."""
    if reason is None:
        resolve.complete("lowrank", parts)
    else:
        with pytest.raises(ValueError, match=f"optimizer lowrank: .*{reason}|{reason}"):
            resolve.complete("lowrank", parts)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("typo, meant", [
    ("update_proj_gpa", "update_proj_gap"), ("scal", "scale"), ("on_refesh", "on_refresh"), ("proj_typ", "proj_type"),
    ("corect_bias", "correct_bias"), ("stager", "stagger"),
])  # fmt: skip
def test_an_unknown_option_is_refused_with_the_nearest_one(name, typo, meant):
    with pytest.raises(ValueError, match=f"no option '{typo}'; did you mean '{meant}'"):
        optimizer(weight(WIDE), name, **{typo: 1})


def test_an_option_of_another_method_is_refused():
    for option, value in (("r0", 2), ("limiter", 1.1), ("fira_form", "paper")):
        with pytest.raises(ValueError, match=f"no option '{option}'"):
            optimizer(weight(WIDE), "galore_dominant_adamw", **{option: value})
    for name in ("golore_msgd", "galore_dominant_adafactor", "fira_came", "flora_adafactor"):  # they add none
        for rank in (3, None):
            with pytest.raises(ValueError, match="no option 'eps_place'"):
                optimizer(weight(WIDE), name, rank=rank, eps_place="released")
    with pytest.raises(ValueError, match="no option 'refresh'"):
        optimizer(weight(WIDE), "galore_random_adamw", refresh="gram")
    with pytest.raises(ValueError, match="no option 'scale'"):  # a dense group has none
        optimizer(weight(WIDE), "galore_dominant_adamw", rank=None, scale=1.0)


@pytest.mark.parametrize("name", COVERING)
def test_the_place_of_eps_is_an_option_where_it_changes_something(name):
    if "eps_place" in resolve.complete(name, {}):
        ends = []
        for place in ("torch", "released"):
            p, v = weight(WIDE), weight((9,))
            matrices, vectors = (optimizer(x, name, rank=r, eps=1e-2, eps_place=place) for x, r in ((p, 3), (v, None)))
            ends.append(
                (finish(matrices, p, gradients(WIDE, 3)), finish(vectors, v, [G[0] for G in gradients((5, 9), 3)]))
            )
        assert not all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_an_unknown_method_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'galore_i3s_adamw'"):
        optimizer(weight(WIDE), "galore_i3_adamw")
    with pytest.raises(ValueError, match="Valid: .*galore_dominant_adamw"):
        optimizer(weight(WIDE), "zzz")


@pytest.mark.parametrize("name", COVERING)
def test_options_come_as_text_too(name):
    p, q = weight(WIDE), weight(WIDE)
    a = finish(optimizer(p, name, rank=3, update_proj_gap=2, scale=0.5, stagger=True), p, gradients(WIDE, 6))
    b = finish(optimizer(q, name, rank="3", update_proj_gap="2", scale="0.5", stagger="true"), q, gradients(WIDE, 6))
    assert torch.equal(a, b)


def test_defaults_are_the_documented_ones():
    group = resolve.complete("galore_dominant_adamw", {})
    assert (group["rank"], group["update_proj_gap"], group["proj_type"], group["scale"]) == (128, 200, "std", 0.25)
    how = {name: resolve.complete(name, {}).get("on_refresh") for name in NAMES}
    assert {how[name] for name in PLAIN if "hybrid" not in name} == {"keep"}
    assert {how[name] for name in NAMES if "hybrid" in name or "golore" in name} == {"rotate"}
    assert {how[name] for name in ("subtrack_pp_adamw", "ldadam")} == {"rotate_variance"}
    assert {how[name] for name in ("grass_adamw", "frugal_adamw")} == {"reset"}
    assert {how[name] for name in ("sumo", "galore_i3s_msgd", "galore_hybrid_msgd")} == {"rotate"}
    nesterov = {name for name in NAMES if resolve.complete(name, {}).get("nesterov")}  # as their authors' code has it
    assert nesterov == {"full_muon", "muon_4bit", "full_normuon", "rmnp"}
    assert {how[name] for name in NAMES if "apollo" in name} == {"keep"}
    scale = {name: resolve.complete(name, {})["scale"] for name in NAMES}
    ones = {"ldadam", "flora_adafactor", "apollo_random_adamw", "apollo_dominant_adamw", "golore_adamw"}
    ones |= {name for name in NAMES if name.endswith("msgd")}
    assert {scale[name] for name in ones} == {1.0} and scale["apollo_mini_adamw"] == 128.0
    assert {scale[name] for name in PLAIN if name not in ones} == {0.25}
    for option, usual, others in (
        ("fira_form", "released", {}),
        ("proj_type", "std", {"ldadam": "paper", "gwt_adamw": "right", "foam_adamw": "right"}),
        ("first_momentum", "damped", {"golore_msgd": "gradient"}),
        ("eps_place", "torch", {}),
    ):
        projecting = [name for name in NAMES if METHODS[name].subspace != "whole"]
        found = {name: resolve.complete(name, {}).get(option, usual) for name in projecting}
        assert {name: value for name, value in found.items() if value != usual} == others


def test_a_name_beside_groups_of_another_method_is_refused():
    """It had no effect: the groups' method stepped them."""
    net = torch.nn.Linear(8, 8)
    groups = param_groups(net, method="fira_adamw", rank=2)
    with pytest.raises(ValueError, match="made for fira_adamw and the optimizer is to be galore_i3s_adamw: give"):
        LowRankOptimizer(groups, "galore_i3s_adamw")
    with pytest.raises(ValueError, match="made for fira_adamw and the optimizer is to be fira_adamw_8bit: give"):
        LowRankOptimizer(groups, "fira_adamw_8bit")
    eight = LowRankOptimizer(param_groups(net, method="fira_adamw_8bit", rank=2), "fira_adamw_8bit")
    assert summary(eight).startswith("fira_adamw_8bit: 1 matrices")
    apart = param_groups(
        net, method="fira_adamw_8bit", rank=2, dense_state_format="fp32"
    )  # as given beside the ending
    assert summary(LowRankOptimizer(apart, "fira_adamw_8bit")).startswith("fira_adamw: 1 matrices")
    assert LowRankOptimizer(groups).configs[0].method == "fira_adamw"
    assert summary(LowRankOptimizer(groups)).startswith("fira_adamw: 1 matrices")
    mixed = [{"params": [net.weight], "rank": 2, "method": "fira_adamw"}, {"params": [net.bias]}]
    made = LowRankOptimizer(mixed, "galore_i3s_adamw")
    assert [config.method for config in made.configs] == ["fira_adamw", "galore_i3s_adamw"]


@pytest.mark.parametrize("given, text", [
    ("0.weight", "'0.weight' matches no trainable matrix: name modules, without .weight"),
    ("^block.*fc", "it matches a part of 'blocks.fc_in', and an expression must match the whole name"),
])  # fmt: skip
def test_target_modules_that_match_nothing_are_told_why(given, text):
    net = torch.nn.Sequential(torch.nn.Linear(8, 8))
    net.add_module("blocks", torch.nn.ModuleDict({"fc_in": torch.nn.Linear(8, 8)}))
    with pytest.raises(ValueError, match=re.escape(text)):
        param_groups(net, rank=2, target_modules=given)


@pytest.mark.parametrize("key, there, here", [("rank", 2, 3), ("state_format", "8bit", "fp32")])
def test_a_checkpoint_that_does_not_fit_says_what_to_do(key, there, here):
    made = [LowRankOptimizer([{"params": [weight(WIDE)], "rank": 2, key: value}]) for value in (there, here)]
    with pytest.raises(
        ValueError, match=f"has {key}={there}, this .*={here}: give it {there}, or start from .*weights"
    ):
        made[1].load_state_dict(made[0].state_dict())
