"""The kernel that writes weights of low precision, as Triton's interpreter runs it: the law of `rounding.round_`."""

from __future__ import annotations

import subprocess
import sys
from math import sqrt

import pytest
import torch
from streams import gradients, optimizer

from hf_lowrank.tensors import fused, rounding


pytest.importorskip("triton")
SPACING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # of the numbers from 1 to 2


def written(values, dtype, seed=0):
    W = torch.empty_like(values, dtype=dtype)
    fused.rewrite_(W, 0.0, values, 1.0, None, None, 0.0, seed)
    return W


@pytest.mark.parametrize("dtype", SPACING)
def test_a_representable_number_is_written_exactly(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[~torch.isnan(every)]
    assert torch.equal(written(every.float(), dtype), every)


@pytest.mark.parametrize("dtype", SPACING)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1])
def test_not_a_number_stays_so(dtype, bits):
    values = torch.full((100,), bits, dtype=torch.int32).view(torch.float32)
    assert written(values, dtype).isnan().all()


@pytest.mark.parametrize("dtype", SPACING)
@pytest.mark.parametrize("value", [1.001, -0.3, 3.14159e-3, 6.2e-5, -3e-5, 1e-7, -2e-8, 1234.567])
def test_rounding_is_unbiased_between_the_two_neighbours(dtype, value):
    values = torch.full((20_000,), value)
    got, exact = written(values, dtype).double(), float(values[0])
    grid = got.unique()
    assert len(grid) == 2 and grid.min() <= exact <= grid.max()
    step = float(grid[1] - grid[0])
    share = (exact - float(grid[0])) / step
    assert abs(float(got.mean()) - exact) <= 5 * step * sqrt(share * (1 - share) / len(values))


def test_draws_are_a_function_of_the_seed_and_differ_from_element_to_element():
    values = torch.full((5000,), 1.003)
    one, two = written(values, torch.bfloat16, 3), written(values, torch.bfloat16, 4)
    assert torch.equal(one, written(values, torch.bfloat16, 3))
    share = float((one.float() > 1.0).double().mean())
    # both up: independent draws agree as often as their shares say
    both = float(((one > 1.0) & (two > 1.0)).double().mean())
    assert abs(both - share**2) < 5 * sqrt(share / 5000)


@pytest.mark.parametrize("dtype", SPACING)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_u, with_g", [(True, True), (True, False), (False, True)])
def test_decay_step_and_scaled_gradient_are_added_before_rounding(dtype, transposed, with_u, with_g):
    gen = torch.Generator().manual_seed(0)

    def laid(x):
        return x.mT.contiguous().mT if transposed else x

    W, U, G = (laid(torch.randn(37, 50, generator=gen)) for _ in range(3))
    W, G, d = W.to(dtype), G.to(dtype), torch.randn(50, generator=gen)
    exact = 0.5 * W.double() + with_u * 2.0 * U.double() + with_g * 0.25 * G.double() * d.double()
    fused.rewrite_(W, 0.5, U if with_u else None, 2.0, G if with_g else None, d if with_g else None, 0.25, 11)
    # to one of the two neighbours; fp32 sums before that are off by some 1e-7 of their largest term
    spacing = SPACING[dtype] * torch.exp2(exact.abs().log2().floor())
    assert ((W.double() - exact).abs() <= 1.01 * spacing + 1e-6).all()


def test_an_operand_that_lies_otherwise_is_refused_by_the_kernel_and_turned_by_the_caller():
    W, G = torch.zeros(4, 6, dtype=torch.bfloat16), torch.ones(6, 4, dtype=torch.bfloat16).mT
    with pytest.raises(ValueError, match="lies as"):
        fused.rewrite_(W, 1.0, None, 0.0, G, torch.ones(6), 1.0, 0)
    rounding.Rounding((1, 2), W.device).fused_(W, 1.0, None, 0.0, G, torch.arange(6.0), 1.0)
    assert torch.equal(W, torch.arange(6.0).expand(4, 6).bfloat16())


def test_on_the_cpu_torchs_own_operations_do_the_work():
    assert not fused.runs_on(torch.device("cpu"))
    assert not rounding.Rounding((1,), torch.device("cpu")).fuses(torch.zeros(4, dtype=torch.bfloat16))


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_lowrank.tensors import fused_kernel

for dtype, dropped in (("bf16", 16), ("fp16", 13)):
    signature = dict.fromkeys(("beta", "alpha", "gamma"), "fp32")
    signature |= dict.fromkeys(("numel", "columns", "stride"), "i32")
    signature |= {"W": f"*{dtype}", "U": "*fp32", "G": f"*{dtype}", "d": "*fp32", "seed": "i64"}
    constant = {"READS": True, "HAS_U": True, "HAS_G": True, "DROPPED": dropped, "SIZE": fused_kernel.BLOCK}
    signature |= dict.fromkeys(constant, "constexpr")
    in_order = {name: signature[name] for name in fused_kernel._kernel.arg_names}  # which older versions go by
    source = ASTSource(fused_kernel._kernel, in_order, constant)
    for architecture in (80, 90):
        print(len(triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]) > 0)
"""


@pytest.mark.processes
def test_it_compiles_for_the_gpus_of_2020_and_2022_without_one(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True"] * 4, done.stderr


@pytest.mark.parametrize("name", ["full_muon", "full_came", "racs", "rmnp", "full_adafactor", "fira_adamw"])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (1, 12), (12, 1)])
def test_whatever_way_a_step_lies_it_is_written_to_the_weight(name, shape, monkeypatch):
    """As torch's own operations write it; a step is computed in whichever order its products come."""
    ends = []
    for fuses in (False, True):
        monkeypatch.setattr(fused, "runs_on", lambda device, fuses=fuses: fuses)
        p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        opt = optimizer(p, name, rank=1 if 1 in shape else 3, lr=1e-2, stochastic_rounding=True)
        p.grad = gradients(shape, 1)[0].bfloat16()
        opt.step()
        ends.append(p.detach().float())
    assert ends[0].norm() > 0
    torch.testing.assert_close(*ends, rtol=2.0**-7, atol=0)  # each rounded its own way, to a neighbour
