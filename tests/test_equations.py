"""Every method, and every combination of parts, against its papers' equations in float64 (references/).

The references compute their bases by themselves, from the gradients and from the keys of what is drawn; whether it is
drawn by the law is tested in test_sampling.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import references
from comparing import GAP, SETTING, STEPS, TOLERANCE, agree, optimizer
from references import REFERENCES
from streams import COVERING, NAMES, SQUARE, STACK, TALL, WIDE, displacement, finish, gradients, weight

from hf_lowrank import METHODS
from hf_lowrank.methods import registry, resolve


EVERY = [name for name in NAMES if not METHODS[name].free]
SOME = [name for name in COVERING if not METHODS[name].free]
PARTS = {kind: registry.classes(kind) for kind in registry.KINDS}
FREE = {kind: sorted(key for key, part in parts.items() if part.composable) for kind, parts in PARTS.items()}


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE, STACK], ids=["wide", "tall", "square", "stack"])
@pytest.mark.parametrize("name", EVERY)
def test_a_run_equals_the_papers_equations(name, shape):
    agree(name, shape)


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("name", SOME)
def test_so_it_does_at_full_rank(name, shape):
    if METHODS[name].defaults.get("rank", 128) <= 1:
        pytest.skip("compresses by a power of two, or is of rank one")
    if METHODS[name].subspace == "online":
        pytest.skip("with nothing outside the basis its slope is rounding noise, which its Adam makes large")
    agree(name, shape, rank=6)


@pytest.mark.parametrize("name", SOME)
def test_without_bias_correction_it_is_the_i3s_papers_eq_1(name):
    agree(name, WIDE, correct_bias=False)


@pytest.mark.parametrize("name", SOME)
def test_another_seed_draws_something_else_and_still_equals_it(name):
    agree(name, WIDE, seed=3)


@pytest.mark.parametrize("name", SOME)
def test_edited_options_of_a_group_take_effect(name):
    edits = {"lr": 5e-3, "scale": 0.8, "weight_decay": 0.3, "eps": 3e-2}
    longer = optimizer(weight(TALL), name).param_groups[0].get("update_proj_gap", 1) == GAP

    def each(t, group, refs):
        # as torch's schedulers leave it; the basis of Online Subspace Descent follows lr / it
        group["initial_lr"] = SETTING["lr"]
        if t == 3:
            group.update(betas=(0.7, 0.9), **edits)
            for ref in refs:
                vars(ref).update(beta1=0.7, beta2=0.9, **edits)
        if t == 6 and longer:  # in the second interval: the third one has the new length
            group["update_proj_gap"] = 2
            for ref in refs:
                ref.gap = 2

    agree(name, TALL, each=each)


@pytest.mark.parametrize("reconstruction", FREE["reconstruction"])
@pytest.mark.parametrize("moments", FREE["moments"])
@pytest.mark.parametrize("subspace", FREE["subspace"])
def test_parts_combine(subspace, moments, reconstruction):
    parts = {"subspace": subspace, "moments": moments, "reconstruction": reconstruction}
    options = {"on_refresh": "reset" if subspace == "rows" else "rotate"}
    if "on_refresh" in PARTS["subspace"][subspace].without:
        options = {}
    if subspace == "golore":
        options["total_steps"] = STEPS
    try:
        resolve.complete("lowrank", {**parts, **options})
    except ValueError as refused:
        made = {kind: registry.prototype(kind, part) for kind, part in parts.items()}
        if made["subspace"].needs_momentum or made["reconstruction"].needs_momentum:
            reason = "of normalised updates" if made["moments"].keeps_momentum else "keep none"
        if made["reconstruction"].needs_orthonormal and not made["subspace"].orthonormal:
            reason = "(not orthonormal|keep none|of normalised updates)"
        assert re.search(reason, str(refused))
        return
    agree("lowrank", TALL, **parts, **options)


# ---- the references are whole, and tell methods apart ---------------------------------------------------------------


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_part_has_a_reference_and_one_without_says_so(kind):
    missing = [f"{kind} {name!r}" for name in PARTS[kind] if (kind, name) not in REFERENCES]
    assert not missing, f"no reference for {', '.join(missing)}"
    with pytest.raises(LookupError, match=f"no reference for {kind} 'x'"):
        references.entry(kind, "x")


def test_references_know_nothing_of_the_package():
    files = list(Path(references.__file__).parent.glob("*.py"))
    assert len(files) > 10
    assert not [
        file.name
        for file in files
        if re.search(r"^\s*(import|from) (hf_lowrank|streams|comparing)", file.read_text(), re.M)
    ]


def alike(a, b):
    """Whether two methods may run alike on a small matrix: Q-GaLore is GaLore until its basis is packed or kept."""
    return {METHODS[a].subspace, METHODS[b].subspace} == {"dominant", "lazy"}


@pytest.mark.parametrize("name", SOME)
def test_no_other_subspace_gives_the_same_run(name):
    """Else one rule might stand in for another; the stream tells them apart by a hundred tolerances."""
    row, ends = METHODS[name], {}
    for other in SOME:
        rest = METHODS[other].moments, METHODS[other].reconstruction
        if rest == (row.moments, row.reconstruction) and not alike(name, other):
            p = weight(STACK)
            ends[other] = finish(optimizer(p, other, scale=0.5), p, gradients(STACK, STEPS))
    for other, end in ends.items():
        if METHODS[other].subspace != row.subspace:
            assert displacement(end, ends[name], weight(STACK)) > 100 * TOLERANCE, other
