"""Everything that is drawn: indices, random bases, rounding. Frequencies are held against five standard errors."""

from __future__ import annotations

from itertools import combinations, permutations
from math import sqrt

import pytest
import torch
from fitting import fitting
from streams import COVERING, STACK, WIDE, finish, gradients, optimizer, orthonormal, run, weight

from hf_lowrank import LowRankOptimizer
from hf_lowrank.tensors import random, rounding


DRAWS = 20_000


def plackett_luce(weights, r):
    """Probability of every set of r indices: the sum over its orders of prod w_k / (1 - those before it)."""
    total, law = sum(weights), {}
    for chosen in combinations(range(len(weights)), r):
        law[chosen] = 0.0
        for order in permutations(chosen):
            probability, left = 1.0, total
            for i in order:
                probability, left = probability * weights[i] / left, left - weights[i]
            law[chosen] += probability
    return law


def frequencies(index):
    sets, counts = torch.unique(index, dim=0, return_counts=True)
    return {tuple(s): c / len(index) for s, c in zip(sets.tolist(), counts.tolist(), strict=True)}


def assert_follows(index, law):
    seen = frequencies(index)
    assert set(seen) <= {chosen for chosen, p in law.items() if p > 0}
    for chosen, p in law.items():
        # 5 standard errors of a binomial: one in a million by chance, and the keyed draw never changes
        assert abs(seen.get(chosen, 0.0) - p) <= 5 * sqrt(p * (1 - p) / len(index))


# ---- indices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0], [100.0, 1.0, 0.1, 0.01]])
def test_gumbel_top_r_follows_the_enumerated_plackett_luce_law(weights):
    index = random.gumbel_top_r(torch.tensor(weights).expand(DRAWS, 4), 2, random.generator(0))
    assert (index[:, 1] > index[:, 0]).all()
    assert_follows(index, plackett_luce(weights, 2))


def test_the_law_does_not_depend_on_the_weights_scale():
    w = torch.tensor([4.0, 3.0, 2.0, 1.0]).expand(100, 4)
    draws = [random.gumbel_top_r(w * scale, 2, random.generator(0)) for scale in (1.0, 1e-30, 1e30)]
    assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2])


def test_a_zero_weight_is_never_drawn_while_enough_are_positive():
    index = random.gumbel_top_r(torch.tensor([0.0, 1e-30, 0.0, 5.0, 1e30]).expand(DRAWS, 5), 3, random.generator(0))
    assert torch.equal(index, torch.tensor([1, 3, 4]).expand(DRAWS, 3))


def test_fewer_positive_weights_than_draws_are_all_taken():
    w = torch.tensor([0.0, 0.0, 3.0, 0.0, 1.0])
    for seed in range(50):
        index = random.gumbel_top_r(w, 4, random.generator(seed)).tolist()
        assert index == [0, 1, 2, 4]
    assert random.gumbel_top_r(torch.zeros(5), 3, random.generator(0)).tolist() == [0, 1, 2]
    assert random.gumbel_top_r(torch.ones(5), 5, random.generator(0)).tolist() == [0, 1, 2, 3, 4]


def test_the_same_key_gives_the_same_draw_and_another_key_another():
    w = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    draws = [
        random.gumbel_top_r(w, 16, random.generator(*key)) for key in ((0, 1, 2), (0, 1, 2), (0, 2, 1), (1, 1, 2))
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])


@pytest.mark.parametrize("name, options, law", [
    ("galore_i3s_adamw", {}, plackett_luce([4, 3, 2, 1], 2)),
    ("fira_i3s_adamw", {}, plackett_luce([4, 3, 2, 1], 2)),
    ("galore_uniform_adamw", {}, plackett_luce([1, 1, 1, 1], 2)),
    ("galore_hybrid_adamw", {"r0": 1}, {(0, 1): 1 / 3, (0, 2): 1 / 3, (0, 3): 1 / 3}),
    ("galore_hybrid_adamw", {"r0": 2}, {(0, 1): 1.0}),
])  # fmt: skip
def test_a_whole_step_samples_singular_vectors_by_the_law(name, options, law):
    """One gradient, a stack of 20000 equal slices: every slice draws for itself, by sigma and not by its square."""
    gen = torch.Generator().manual_seed(3)
    U = orthonormal(4, 4, gen)
    G = (U * torch.tensor([4.0, 3.0, 2.0, 1.0]) @ orthonormal(6, 4, gen).T).float()
    p = torch.nn.Parameter(torch.zeros(DRAWS, 4, 6))
    opt = optimizer(p, name, rank=2, **options)
    finish(opt, p, [G.expand(DRAWS, 4, 6)])
    assert_follows((U.float().T @ opt.state[p]["basis"]).abs().argmax(1), law)


@pytest.mark.parametrize("name", ["galore_i3s_adamw", "galore_uniform_adamw", "galore_random_adamw"])
def test_every_parameter_refresh_and_seed_has_a_stream_of_its_own(name):
    stream, bases = gradients((16, 24), 2, drift=0.0, decay=0.97), []
    for seed in (0, 1):
        ps = [weight((16, 24)) for _ in range(2)]
        opt = LowRankOptimizer([{"params": ps, "rank": 4, "update_proj_gap": 1}], name, seed=seed)
        for G in stream:
            for p in ps:
                p.grad = G.clone()
            opt.step()
            bases += [opt.state[p]["basis"].clone() for p in ps]
    spans = [P @ P.T for P in bases]  # two equal spans of 4 of 16 by chance: one pair in 1820 x 28 pairs at most
    assert all((a - b).norm() > 0.1 for a, b in combinations(spans, 2))


# ---- random bases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, r", [(4, 2), (5, 5), (3, 1)])
def test_uniform_stiefel_is_orthonormal_and_covers_every_direction_alike(m, r):
    P = random.uniform_stiefel(torch.Size((DRAWS, m, r)), random.generator(0)).double()
    assert (P.mT @ P - torch.eye(r)).abs().max() < 1e-5
    mean = (P @ P.mT).mean(0)  # entries of a projector have a standard deviation of at most 1/2
    assert (mean - r / m * torch.eye(m)).abs().max() < 5 * 0.5 / sqrt(DRAWS)
    if r < m:  # Haar: E[P] = 0, entries of size 1/sqrt(m); QR without its signs fixed has a positive diagonal
        assert P.mean(0).abs().max() < 5 / sqrt(m * DRAWS)


def test_a_whole_step_draws_random_subspaces_uniformly():
    p = torch.nn.Parameter(torch.zeros(DRAWS, 4, 6))
    opt = optimizer(p, "galore_random_adamw", rank=2)
    finish(opt, p, [gradients((4, 6), 1)[0].expand(DRAWS, 4, 6)])
    P = opt.state[p]["basis"].double()
    assert ((P @ P.mT).mean(0) - 0.5 * torch.eye(4)).abs().max() < 5 * 0.5 / sqrt(DRAWS)


# ---- rounding -------------------------------------------------------------------------------------------------------


def rounded(values, dtype, seed=0):
    out = torch.empty_like(values, dtype=dtype)
    rounding.round_(out, values.clone(), random.Bits(random.generator(seed)))
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "value", [1.001, -1.001, 0.3, 3.14159e-3, -7.7e-5, 6.2e-5, 3e-5, -3e-5, 1e-7, 5e-8, -2e-8, 1234.567, 0.0, -60000.7]
)
def test_rounding_is_unbiased_between_the_two_neighbours(dtype, value):
    values = torch.full((50_000,), value)
    got = rounded(values, dtype).double()
    exact = float(values[0])  # as fp32 has it
    grid = got.unique()
    assert len(grid) <= 2 and grid.min() <= exact <= grid.max()
    if len(grid) == 2:
        step = float(grid[1] - grid[0])
        share = (exact - float(grid[0])) / step
        assert abs(float(got.mean()) - exact) <= 5 * step * sqrt(share * (1 - share) / len(values))


@pytest.mark.parametrize("value", [1e-12, -1e-12])
def test_rounding_is_unbiased_far_below_fp16s_smallest_number(value):
    """A step of 1e-12 is 1.7e-5 of fp16's smallest number 2^-24: of 2 million draws some 34 must reach it."""
    got = torch.cat([rounded(torch.full((500_000,), value), torch.float16, seed) for seed in range(4)]).double()
    share = abs(value) * 2**24
    assert abs(float(got.mean()) - value) <= 5 * 2**-24 * sqrt(share / len(got))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_representable_number_is_written_exactly(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[torch.isfinite(every)]
    for seed in range(3):
        assert torch.equal(rounded(every.float(), dtype, seed), every)


@pytest.mark.parametrize("steps", [-1023, 1, 700])
def test_a_number_below_fp16s_normal_ones_never_moves(steps):
    values = torch.full((2**20,), steps * 2.0**-24)
    assert torch.equal(rounded(values, torch.float16).float(), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x400000])
def test_not_a_number_stays_so_whatever_its_bits(dtype, bits):
    values = torch.full((1000,), bits, dtype=torch.int32).view(torch.float32)
    assert rounded(values, dtype).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 0.0, -0.0])
def test_infinities_and_zeros_stay_what_they_are(dtype, value):
    assert (rounded(torch.full((1000,), value), dtype) == value).all()


LAYOUTS = {
    "rows": lambda g: torch.randn(6, 10, generator=g),
    "columns": lambda g: torch.randn(10, 6, generator=g).mT,
    "every other column": lambda g: torch.randn(6, 20, generator=g)[:, ::2],
    "stack of columns": lambda g: torch.randn(3, 10, 6, generator=g).mT,
    "permuted stack": lambda g: torch.randn(10, 3, 6, generator=g).permute(1, 2, 0),
    "number": lambda g: torch.randn((), generator=g),
    "nothing": lambda g: torch.randn(0, 4, generator=g),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounding_goes_to_a_neighbour_in_every_layout(dtype, layout):
    values = LAYOUTS[layout](random.generator(1))
    out = torch.empty_like(values, dtype=dtype)
    rounding.round_(out, values.clone(), random.Bits(random.generator(0)))
    spacing = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]  # of the numbers from 1 to 2
    assert ((out.float() - values).abs() < spacing * torch.exp2(values.abs().log2().floor())).all()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_random_bits_are_uniform_and_any_two_of_several_pieces_independent(dtype, monkeypatch):
    monkeypatch.setattr(random, "PATTERN", 1)  # all words of a piece change by the same one: the most that is shared
    drawn = []
    for seed in range(DRAWS):
        bits = random.Bits(random.generator(seed))
        drawn.append(torch.cat([bits.like(torch.empty(size), dtype).clone() for size in (9, 9, 5, 10)]))
    x = torch.stack(drawn).double() / 2.0 ** (8 * dtype.itemsize - 1)
    # an estimate from DRAWS draws lies within five standard deviations, 1/sqrt(3) and 1/3 for one draw
    assert x.mean(0).abs().max() < 5 / sqrt(3 * DRAWS)
    products = x.mT @ x / DRAWS
    assert (products - torch.eye(len(products)) / 3).abs().max() < 5 / 3 / sqrt(DRAWS)
    ups = (x > 0.25).double() - 3 / 8  # how often two round up together, where three of eight do
    assert (ups.mT @ ups / DRAWS - torch.eye(len(products)) * 15 / 64).abs().max() < 5 * 15 / 64 / sqrt(DRAWS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_later_pieces_of_a_weight_are_rounded_without_bias(dtype):
    """A number three tenths of the way to its neighbour, in three pieces of one weight."""
    spacing = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    bits, size = random.Bits(random.generator(0)), 200_000
    for _ in range(3):
        out = torch.empty(size, dtype=dtype)
        rounding.round_(out, torch.full((size,), 1 + 0.3 * spacing), bits)
        share = float((out.double() - 1).mean()) / spacing
        assert abs(share - 0.3) < 5 * sqrt(0.21 / size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_random_bits_rounding_is_to_nearest(dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(values, dtype=dtype)
    rounding.round_(out, values, None)
    assert torch.equal(out, values.to(dtype))


@pytest.mark.parametrize("rank", [1, None])
def test_small_steps_on_bf16_weights_add_up(rank):
    """100 steps of -1e-3 on 1.0, each under half of bf16's spacing of 2^-8: to nearest they are all lost."""
    moved = {}
    for stochastic in (True, False):
        p = torch.nn.Parameter(torch.ones(4, 2500, dtype=torch.bfloat16))
        options = {"rank": rank, "scale": 1.0, "update_proj_gap": 1000} if rank else {"rank": None}
        opt = optimizer(p, "galore_dominant_adamw", lr=1e-3, eps=1e-12, stochastic_rounding=stochastic, **options)
        G = torch.ones(4, 2500, dtype=torch.bfloat16)  # Adam's step of a constant is lr; in one dimension it is lr / 2
        moved[stochastic] = 1 - float(finish(opt, p, [G] * 100).float().mean())
    # 100 steps of at most half a spacing each on 10000 entries: standard error 2^-9 sqrt(100 / 10000) = 2e-4
    assert moved[True] == pytest.approx(0.05 if rank else 0.1, abs=1e-3)
    assert moved[False] == 0


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decay_far_under_the_spacing_works_in_the_mean(dtype, rank):
    p = torch.nn.Parameter(torch.ones(8, 5000, dtype=dtype))
    opt = optimizer(p, "galore_dominant_adamw", rank=rank, lr=1e-3, weight_decay=1e-2)  # 1e-5 a step
    finish(opt, p, [torch.zeros(8, 5000)] * 200)
    # 0.99999^200 = 0.998; a step moves an entry by one spacing (2^-8 at most) with probability 1e-5 / 2^-8: the
    # standard error of the mean of 40000 entries is sqrt(200 x 1e-5 x 2^-8 / 40000) = 1.4e-5
    assert float(p.detach().float().mean()) == pytest.approx(0.998, abs=7e-5)


@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [3, None])
def test_an_update_of_zero_leaves_low_precision_weights_alone(name, dtype, rank):
    p = weight(WIDE, dtype=dtype)
    before = p.detach().clone()
    assert torch.equal(finish(optimizer(p, name, rank=rank), p, [torch.zeros(WIDE)] * 5), before)
    assert torch.equal(finish(optimizer(p, name, rank=rank, lr=0.0), p, gradients(WIDE, 5)), before)


# ---- the global generator -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COVERING)
def test_a_run_neither_reads_nor_moves_the_global_generators(name):
    def train():
        ps = [
            weight(WIDE, dtype=torch.bfloat16),
            weight(STACK),
            torch.nn.Parameter(torch.zeros(5, dtype=torch.bfloat16)),
        ]
        groups = [{"params": ps[:2], **fitting(name, {"rank": 2, "update_proj_gap": 2})}, {"params": ps[2:]}]
        opt = LowRankOptimizer(groups, name, lr=1e-2)
        for t in range(5):
            for p in ps:
                p.grad = torch.linspace(-1, 1 + t, p.numel()).reshape(p.shape).to(p.dtype)
            opt.step()
        return ps

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, train(), strict=True))


@pytest.mark.parametrize("name", ["galore_dominant_adamw", "fira_adamw"])
def test_a_randomized_refresh_does_not_move_it_either(name):
    before, p = torch.get_rng_state(), weight(WIDE)
    opt = optimizer(p, name, refresh="randomized", update_proj_gap=1)
    for _ in run(opt, p, gradients(WIDE, 3)):
        assert torch.equal(torch.get_rng_state(), before)
