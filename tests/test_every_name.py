"""Every name of the table: it constructs, steps and resumes. What its parts do is tested part by part elsewhere."""

from __future__ import annotations

import pytest
import torch
from distributed import models
from streams import COVERING, NAMES, names_covering

from hf_lowrank import METHODS
from hf_lowrank.methods import registry, resolve


@pytest.mark.parametrize("name", resolve.names())
def test_it_steps_and_resumes_bit_for_bit(name):
    whole, net = models.model(experts=2), models.model(experts=2)
    models.train(whole, models.optimizer(whole, name), 6)
    first = models.optimizer(net, name)
    models.train(net, first, 4)  # refreshes before steps 0 and 3
    start = models.model(experts=2)
    assert not any(torch.equal(a, b) for a, b in zip(net.parameters(), start.parameters(), strict=True))
    again = models.model(experts=2)
    again.load_state_dict(net.state_dict())
    second = models.optimizer(again, name)
    second.load_state_dict(first.state_dict())
    models.train(again, second, 2, start=4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", registry.KINDS)
def test_the_names_that_the_sweeps_take_have_every_part_that_a_row_has(kind):
    assert {getattr(METHODS[name], kind) for name in COVERING} == {getattr(METHODS[name], kind) for name in NAMES}


def test_a_row_of_old_parts_and_defaults_is_in_no_sweep_and_one_with_a_new_part_is(monkeypatch):
    old = METHODS["galore_i3s_adamw"]
    rows = {"old": old, "new": type(old)("dominant", "unheard_of", "project", "", "")}
    for name, row in rows.items():
        monkeypatch.setitem(METHODS, name, row)
    taken = names_covering(("subspace", "reconstruction"), ("moments",))
    assert "new" in taken and "old" not in taken
