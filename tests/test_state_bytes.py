"""What a method keeps: declared bytes beside a formula written here, the derived one, and what is allocated."""

from __future__ import annotations

import re

import pytest
import torch
from streams import finish, gradients, optimizer, weight

from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.methods import resolve
from hf_lowrank.methods.formula import state_formula


COUNTERS = 7 * 8 + 3 * 4  # step, moment_step, skipped, refreshes, refresh_at, earlier, dropped_at; a refresh's report
DIRECT = 3 * 8 + 3 * 4  # step, moment_step, skipped, and an empty report: there is nothing to refresh
ADAM = {name: lambda m, n, r: m * r + 2 * n * r for name in METHODS if METHODS[name].moments == "adam"}
NUMBERS = ADAM | {
    **{name: lambda m, n, r: m * r + n * r for name in METHODS if METHODS[name].moments in ("momentum", "muon")},
    "natural_galore_adamw": lambda m, n, r: m * r + 2 * n * r + 4 * n * r,
    "q_galore_adamw": lambda m, n, r: m * r / 8 + 2 * n * r,
    "ldadam": lambda m, n, r: m * r + 2 * n * r + m * n,
    "flora_adafactor": lambda m, n, r: n * r + m + n,
    "grass_adamw": lambda m, n, r: 2 * r + 2 * n * r,
    "online_subspace_adamw": lambda m, n, r: 3 * m * r + 2 * n * r,
    "apollo_random_adamw": lambda m, n, r: 2 * n * r + 1,
    "apollo_dominant_adamw": lambda m, n, r: m * r + 2 * n * r + 1,
    "apollo_mini_adamw": lambda m, n, r: 2 * n * r + 1,
    "gwt_adamw": lambda m, n, r: 2 * n * r + 1,
    "foam_adamw": lambda m, n, r: 2 * n * r,
    **{name: lambda m, n, r: m * r + n * r + r + n for name in METHODS if METHODS[name].moments == "adafactor"},
    **{name: lambda m, n, r: m * r + n * r + n for name in METHODS if METHODS[name].moments == "adam_mini"},
    **{name: lambda m, n, r: m * r + n * r + 2 * (r + n) for name in METHODS if METHODS[name].moments == "came"},
}
WHOLE = {
    "adam": lambda m, n, r: 2 * m * n,
    "adafactor": lambda m, n, r: m * n + m + n,
    "came": lambda m, n, r: m * n + 2 * (m + n),
    "adam_mini": lambda m, n, r: m * n + n,
    "momentum": lambda m, n, r: m * n,
    "sgd": lambda m, n, r: 0,
    "adalomo": lambda m, n, r: m + n,
    "sm3": lambda m, n, r: m * n + m + n,
    "muon": lambda m, n, r: m * n,
    "normuon": lambda m, n, r: m * n + n,
    "rmnp": lambda m, n, r: m * n,
    "racs": lambda m, n, r: m + n + 1,
    "sinkhorn": lambda m, n, r: 0,
    "whitened": lambda m, n, r: 0,
}
NUMBERS |= {name: WHOLE[row.moments] for name, row in METHODS.items() if row.subspace == "whole"}
NUMBERS["muon_4bit"] = lambda m, n, r: m * n / 8 + m  # in fp32 numbers, as all of them
FIRA = [name for name, row in METHODS.items() if row.reconstruction == "fira"]
NUMBERS |= {name: lambda m, n, r, rest=NUMBERS[name]: rest(m, n, r) + 1 for name in FIRA}
ALICE = ("alice_adamw", "alice_muon")
NUMBERS |= {name: lambda m, n, r, rest=NUMBERS[name]: rest(m, n, r) + n + 1 for name in ALICE}
# counters of their own, in bytes; Grass counts an index as one number, which takes eight bytes
OWN = {"natural_galore_adamw": 8, "q_galore_adamw": 5 * 4 + 2 * 8}


def gauges(opt):
    """Bytes of what is kept for the log."""
    return 4 * len(opt.gauges())


def evaluated(formula, **sizes):
    """The number that a formula like `mr/8 + 2nr + 1` stands for."""
    total = 0.0
    for term in formula.split(" + "):
        number, letters, power, divisor = re.fullmatch(r"(\d*)([mnr]*)(\^2)?(?:/(\d+))?", term).groups()
        value = float(number or 1)
        for letter in letters * (2 if power else 1):
            value *= sizes[letter]
        total += value / int(divisor or 1)
    return total


def sizes_of(name, shape):
    """Rank option, and m, n, r of a weight as the method sees it."""
    default = resolve.complete(name, {})["rank"]
    if default < 1:  # blocks of the weight's own last axis
        return default, shape[1], shape[0], int(shape[1] * default)
    if METHODS[name].subspace == "whole":  # the columns are the weight's first axis
        return default, shape[1], shape[0], 1
    return (default, min(shape), max(shape), 1) if default == 1 else (8, min(shape), max(shape), 8)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
@pytest.mark.parametrize("name", METHODS)
def test_declared_bytes_are_those_of_the_formula(name, shape):
    if name == "q_galore_adamw":
        shape = tuple(8 * k for k in shape)  # smaller bases are not packed
    rank, m, n, r = sizes_of(name, shape)
    opt = optimizer(p := weight(shape), name, rank=rank)
    numbers = evaluated(state_formula(opt.configs[0]), m=m, n=n, r=r)
    assert name not in NUMBERS or NUMBERS[name](m, n, r) == numbers
    if (
        "adam_mini" in name and METHODS[name].subspace != "whole" and shape[0] < shape[1]
    ):  # outputs are mixed: one second moment per row of R
        numbers += r - n
    if name == "q_galore_adamw":
        numbers += m * r / 128  # a scale for every block
    wide_index = 4 * r if name == "grass_adamw" else 0
    counters = DIRECT if opt.configs[0].parts.direct else COUNTERS
    scales = 4 * n if name == "muon_4bit" else 0  # one for each column
    assert opt.declared_bytes() == 4 * numbers + counters + OWN.get(name, 0) + wide_index + gauges(opt) + scales
    finish(opt, p, gradients(shape, 1) if m < 100 else [torch.randn(shape)])
    assert sum(x.numel() * x.element_size() for x in opt.state[p].values()) == opt.declared_bytes()


@pytest.mark.parametrize("name, options, formula, own", [
    ("subtrack_adamw", {"accumulate": True}, "mr + 2nr + mn", 8),
    ("subtrack_pp_adamw", {"accumulate": True}, "mr + 2nr + mn + 1", 8),
    ("ldadam", {"error_feedback": "off"}, "mr + 2nr", 0),
    ("ldadam", {"error_feedback": "bf16"}, "mr + 2nr + mn/2", 0),
    ("alice_adamw", {"tracking": True}, "mr + 2nr + r^2 + n + 1", 0),
    ("galore_i3s_adamw", {"stable_spam": True}, "mr + 2nr + 3", 0),
    ("natural_galore_adamw", {"history": 20}, "mr + 22nr", 8),
    ("galore_dominant_adamw", {"proj_type": "full"}, "mr + nr + 2r^2", 0),
    ("galore_i3s_msgd", {"proj_type": "full"}, "mr + nr + r^2", 0),
])  # fmt: skip
def test_declared_bytes_with_options(name, options, formula, own):
    opt = optimizer(weight((96, 64)), name, rank=8, **options)
    assert state_formula(opt.configs[0]) == formula
    assert opt.declared_bytes() == 4 * evaluated(formula, m=64, n=96, r=8) + COUNTERS + own + gauges(opt)


def test_declared_bytes_of_an_8_bit_error_buffer_have_scales():
    opt = optimizer(weight((96, 64)), "ldadam", rank=8, error_feedback="8bit")
    numbers = 64 * 8 + 2 * 96 * 8 + 64 * 96 / 4 + 96  # one for every row of the weight
    assert opt.declared_bytes() == 4 * numbers + COUNTERS


def test_declared_bytes_of_one_second_moment_per_head():
    groups = [{"params": [("q_proj.weight", weight((96, 64)))], "rank": 8, "head_dim": 16}]
    opt = LowRankOptimizer(groups, "galore_dominant_adam_mini")
    assert opt.declared_bytes() == 4 * (64 * 8 + 96 * 8 + 96 // 16) + COUNTERS


def test_declared_bytes_of_q_galore_with_8_bit_moments():
    m, n, r = 512, 768, 8
    opt = optimizer(weight((m, n)), "q_galore_adamw_8bit", rank=r)
    assert state_formula(opt.configs[0]) == "mr/8 + nr/2"
    scales = m * r / 128 + 2 * n  # of the moments one for every column
    assert opt.declared_bytes() == 4 * (m * r / 8 + n * r / 2 + scales) + COUNTERS + OWN["q_galore_adamw"]
