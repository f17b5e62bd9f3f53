"""What a step asks of a GPU, counted on fake CUDA tensors: few launches, one wait, nothing large, nothing mixed."""

from __future__ import annotations

import pytest
import torch
from fitting import fitting
from streams import COVERING, NAMES
from torch.utils._pytree import tree_leaves

from hf_lowrank import LowRankOptimizer
from hf_lowrank.methods import resolve
from hf_lowrank.methods.dense import RULES
from hf_lowrank.planning.workspace import workspace_bytes
from recipes.benchmarks import device_counts
from recipes.benchmarks.fake_cuda import DEVICE, Counted, fake_cuda, where


DTYPES = [torch.float32, torch.bfloat16]
EVERY_STEP = [name for name in NAMES if resolve.complete(name, {}).get("update_proj_gap", 1) == 1]
"""Rows that move their basis at every step, or have none: an ordinary step is one with a refresh."""

LARGEST = 2**27  # two halves in bf16 of the bases of one stack: 2^26 numbers, as much memory as a bucket of R in fp32


def launches(step):
    return sum(step.launches.values())


def check(name, size, dtype, layers, per_matrix):
    counts = device_counts.counted(name, size, dtype, layers=layers)
    matrices = 7 * layers
    for step in (counts.first, counts.ordinary, counts.refresh):
        assert not step.mixed
        assert step.largest[0] <= LARGEST, step.largest
    assert sum(counts.ordinary.syncs.values()) <= 1 + (name in EVERY_STEP), counts.ordinary.syncs
    # a wave of bases is chosen before the host looks; what LDAdam adds up of a 7B matrix is a wave by itself
    wave = 1 if (name, size) == ("ldadam", "7b") else 16
    assert sum(counts.refresh.syncs.values()) <= 1 + -(-matrices // wave), counts.refresh.syncs
    assert max(counts.ordinary.peak, counts.refresh.peak) <= counts.workspace
    assert launches(counts.ordinary) <= per_matrix * matrices, counts.ordinary.launches


# rows whose parts look at every element of the gradient step one by one; some of them refresh, too
@pytest.mark.parametrize("name", COVERING)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_part_waits_once_a_step(name, dtype):
    check(name, "60m", dtype, 1, per_matrix=120)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["60m", "7b"])
def test_every_row_waits_once_a_step(name, dtype, size):
    check(name, size, dtype, 2, per_matrix=104)


UNUSUAL = [
    ("galore_i3s_adamw", torch.bfloat16, (16, 512, 704), {"rank": 64}),  # a stack of experts
    ("galore_i3s_adamw", torch.float32, (2048, 28672), {"rank": 128, "refresh": "svd"}),
    ("galore_dominant_adamw", torch.float32, (1024, 2752), {"rank": 128, "proj_type": "full"}),
    ("full_muon", torch.bfloat16, (8192, 28672), {}),  # larger than a bucket
    ("muon_4bit", torch.bfloat16, (8192, 28672), {}),
    ("full_came", torch.float32, (8192, 28672), {}),
    ("apollo_random_adamw", torch.bfloat16, (8192, 28672), {"rank": 2048}),
    ("galore_i3s_came_8bit", torch.float32, (4096, 4096), {"rank": 1024}),
    ("galore_dominant_muon", torch.float16, (1024, 2816), {"rank": 1000}),
]


@pytest.mark.parametrize("name, dtype, shape, options", UNUSUAL)
def test_the_estimate_holds_for_matrices_that_llama_has_not(name, dtype, shape, options):
    with fake_cuda():
        params = [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=DEVICE)) for _ in range(2)]
        usual = {"rank": 1} if "rank" not in options else {"update_proj_gap": 3, "stagger": False}
        opt = LowRankOptimizer([{"params": params, **usual, **options}], name)
        for t in range(4):
            for p in params:
                p.grad = torch.empty_like(p)
            with Counted() as step:
                opt.step()
            assert not t or step.peak <= workspace_bytes(opt.declared())  # the first makes the state


def test_the_estimate_holds_for_coded_state_of_a_table():
    with fake_cuda():
        p = torch.nn.Parameter(torch.empty(32000, 4096, device=DEVICE))
        opt = LowRankOptimizer([{"params": [p], "dense_state_format": "8bit"}], "full_adamw")
        for _ in range(2):
            p.grad = torch.empty_like(p)
            with Counted() as step:
                opt.step()
    assert step.peak <= workspace_bytes(opt.declared())


OF_DENSE = [("galore_dominant_adamw", rule) for rule in RULES]
OF_DENSE += [(f"galore_dominant_{moments}", "same") for moments in ("adafactor", "came", "adam_mini")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["head", "embedding"])
@pytest.mark.parametrize("name, rule", OF_DENSE)
def test_a_rule_of_dense_parameters_waits_once_and_keeps_to_the_estimate(name, rule, kind, dtype):
    with fake_cuda():
        p = torch.nn.Parameter(torch.empty(32000, 512, dtype=dtype, device=DEVICE))
        opt = LowRankOptimizer([{"params": [p], "dense": rule, "kind": kind}], name)
        for _ in range(2):
            p.grad = torch.empty_like(p)
            with Counted() as step:
                opt.step()
    assert sum(step.syncs.values()) <= 1 and step.peak <= workspace_bytes(opt.declared())


# launches of a whole step of 7B (224 matrices, 67 other tensors), what a step of its first layers may take of them
AT_7B = {
    ("galore_i3s_adamw", torch.float32): 700,
    ("galore_i3s_adamw", torch.bfloat16): 2000,
    ("fira_adamw", torch.float32): 2500,
    ("fira_adamw", torch.bfloat16): 3500,
    ("apollo_random_adamw", torch.float32): 2000,
    ("apollo_random_adamw", torch.bfloat16): 3000,
}


@pytest.mark.full
@pytest.mark.parametrize("name, dtype", AT_7B)
def test_launches_of_7b(name, dtype):
    assert launches(device_counts.counted(name, "7b", dtype, refresh=False).ordinary) <= AT_7B[name, dtype]


@pytest.mark.parametrize("name, dtype", AT_7B)
def test_launches_of_four_layers_of_7b(name, dtype):
    """An eighth of them, and as much again for stacks that are not full: the whole is counted by the long tests."""
    assert (
        launches(device_counts.counted(name, "7b", dtype, layers=4, refresh=False).ordinary) <= AT_7B[name, dtype] / 4
    )


@pytest.mark.parametrize("name, most", [("galore_i3s_adamw", 150), ("fira_adamw", 400)])
def test_launches_of_60m(name, most):
    assert launches(device_counts.counted(name, "60m", torch.float32, refresh=False).ordinary) <= most


def test_bytes_of_galore_are_near_what_is_needed():
    counts = device_counts.counted("galore_i3s_adamw", "7b", torch.float32, layers=2)
    assert counts.needed < counts.ordinary.bytes < 1.6 * counts.needed


def test_products_of_bf16_weights_run_on_tensor_cores_and_those_of_a_refresh_do_not():
    counts = device_counts.counted("galore_i3s_adamw", "60m", torch.bfloat16, layers=1)
    m, n, r = 512, 1376, 128
    once = 2 * r * (4 * m * m + 3 * m * n)
    assert counts.ordinary.flops == {"bfloat16": 3 * once}  # two halves of P there, one product back
    assert counts.refresh.flops["float64"] == 2 * (4 * m**3 + 3 * m * m * n)


def test_what_is_counted_is_counted_right():
    with fake_cuda(), Counted() as step:
        A, B = (torch.empty(8, 8, device=DEVICE) for _ in range(2))
        C = A.mT @ B
        C.add_(A)
        float(C.sum())
        C.copy_(torch.zeros(8, 8))
        assert not step.mixed
        _ = A + torch.ones(())  # a number of the host
        with pytest.raises(RuntimeError, match="device"):
            _ = A + torch.ones(8, 8)
    assert step.launches["mm"] == step.launches["add_"] == step.launches["sum"] == step.launches["memcpy"] == 1
    assert step.flops == {"float32": 2 * 8**3}
    assert step.moved["mm"] == 4 * 3 * 64
    assert step.moved["add_"] == 4 * 3 * 64
    assert [kind for kind, _ in step.syncs] == ["read", "to the device"]


def test_afterwards_the_cpu_is_as_it_was():
    from streams import finish, gradients, optimizer, weight

    p, q = weight((6, 11)), weight((6, 11))
    before = finish(optimizer(p, "galore_i3s_adamw"), p, gradients((6, 11), 5))
    device_counts.counted("galore_i3s_adamw", "60m", torch.float32, layers=1)
    assert torch.equal(before, finish(optimizer(q, "galore_i3s_adamw"), q, gradients((6, 11), 5)))


class WithoutDoubles(Counted):
    """What MPS refuses: numbers in float64 there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        assert not any(x.device.type == "mps" and x.dtype == torch.float64 for x in made), (func, where())
        return out


@pytest.mark.parametrize("name", COVERING)
def test_nothing_is_in_float64_on_a_device_that_has_none(name):
    """Steps with a second refresh, clipped where the method does so."""
    clipped = {} if resolve.parts(name, {}).needs_gradient else {"max_grad_norm": 1.0}
    with fake_cuda():
        weights = [
            torch.nn.Parameter(torch.empty(shape, device="mps:0")) for shape in [(16, 40)] * 2 + [(40, 16), (16,)]
        ]
        options = fitting(name, {"rank": 4, "update_proj_gap": 2})
        opt = LowRankOptimizer(
            [{"params": weights[:3], **options, **clipped}, {"params": weights[3:], **clipped}], name, lr=1e-2
        )
        with WithoutDoubles():
            for _ in range(4):
                for p in weights:
                    p.grad = torch.empty_like(p)
                opt.step()
