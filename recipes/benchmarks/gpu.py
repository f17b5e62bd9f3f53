"""What a GPU really does, in half an hour: to be run by whoever has one. No network is needed, and torch alone, but
for `identities`, which needs the tests' packages (`pip install -e ".[test]"`).

    python recipes/benchmarks/gpu.py --out results            # every section, a JSON file for each as it ends
    python recipes/benchmarks/gpu.py --out results --sections steps,refresh
    python recipes/benchmarks/gpu.py --out results --device cpu --quick   # tiny shapes: shows that it runs

| section | what is measured |
|---|---|
| `kernels` | both products in every precision, norms of columns, Adam, the fused write and the plain one |
| `refresh` | each way to a basis by size of the matrix: milliseconds, peak bytes, whether vectors are right |
| `steps` | ordinary step of ours beside galore-torch, apollo-torch, fused AdamW, 60M to 7B with a few layers |
| `training` | a plain LLaMA of 1B: tokens per second, and the optimizer's share with refreshes amortised |
| `ahead` | whole steps of 1B with refreshes every 20 steps: waited for, and beside the steps (`async_refresh`) |
| `memory` | peak bytes of training steps beside the estimate |
| `resume` | bit for bit: resume, layerwise against plain, the same run twice |
| `identities` | the package's identity tests with weights on the device |

Published packages that are not installed are left out. A section that fails is recorded with its error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from hf_lowrank import LowRankOptimizer, param_groups  # noqa: E402
from hf_lowrank.observe import counting  # noqa: E402
from hf_lowrank.planning.workspace import workspace_bytes  # noqa: E402
from hf_lowrank.tensors import bases, fused, kernels, random, rounding  # noqa: E402
from recipes.benchmarks.on_device import Bench, environment  # noqa: E402
from recipes.benchmarks.plain_llama import SIZES, PlainLlama  # noqa: E402


GAP = 200
NAMES = ("galore_i3s_adamw", "galore_dominant_adamw", "fira_adamw", "apollo_random_adamw")


def measure_kernels(bench: Bench) -> dict[str, Any]:
    """Time what a step of one matrix is made of."""
    shapes = [(512, 1376, 128), (2048, 5461, 512), (4096, 4096, 1024), (4096, 11008, 1024)]
    found: dict[str, Any] = {}
    for m, n, r in [(64, 96, 8)] if bench.quick else shapes:
        P = torch.linalg.qr(bench.randn(m, r))[0].contiguous()
        row: dict[str, float] = {}
        for dtype in (torch.float32, torch.bfloat16):
            G, W, Z = bench.randn(m, n, dtype=dtype), bench.randn(m, n, dtype=dtype), bench.randn(r, n)
            name = str(dtype).removeprefix("torch.")
            for kind in ("ieee", "tf32", "bf16x2", "bf16"):
                basis = bases.Dense(P, kind)
                row[f"project {name} {kind}"] = bench.milliseconds(lambda b=basis, g=G: b.project(g))
                row[f"expand {name} {kind}"] = bench.milliseconds(lambda b=basis, z=Z, w=W: b.expand(z, w))
            row[f"column norms {name}"] = bench.milliseconds(lambda g=G: kernels.column_norms(g))
        U = bench.randn(m, n)
        row["round, plain"] = bench.milliseconds(
            lambda w=W, u=U: rounding.round_(w, u.clone(), random.Bits(random.generator(0, device=bench.device)))
        )
        if fused.fits(W):
            row["write, fused"] = bench.milliseconds(
                lambda w=W, u=U, g=G: fused.rewrite_(w, 0.9, u, 1.0, g, u[0].contiguous(), 1.0, 1)
            )
        found[f"{m} x {n}, r = {r}"] = row
    return found


def measure_refresh(bench: Bench) -> dict[str, Any]:
    """Time each way to a basis, and compare its vectors with those of an SVD where that is affordable."""
    found: dict[str, Any] = {}
    for m, n in [(64, 96)] if bench.quick else [(512, 1376), (1024, 2736), (2048, 5461), (4096, 11008), (8192, 28672)]:
        U = torch.linalg.qr(bench.randn(m, m))[0]
        sigma = torch.logspace(0, -3, m, device=bench.device)
        G = (U * sigma) @ torch.linalg.qr(bench.randn(n, m))[0].mT
        r, gen = m // 4, random.generator(1, device=random.with_float64(bench.device))
        ways: dict[str, Callable[[], Any]] = {
            "gram": lambda g=G: kernels.gram_basis(g),
            "randomized": lambda g=G, r=r, gen=gen: kernels.range_finder(g, r, gen),
            "power": lambda g=G, u=U, r=r: kernels.power_step(g, u[:, :r].contiguous()),
        }
        if m <= 2048:
            ways["svd"] = lambda g=G: kernels.svd_basis(g)
        row: dict[str, Any] = {}
        for name, way in ways.items():
            row[name] = {"ms": bench.milliseconds(way, repeats=2), "peak bytes": bench.peak(way)}
        cosines = (kernels.gram_basis(G)[0].mT @ U).abs().amax(0)
        row["gram"]["worst cosine"] = float(cosines.min())
        thin = bench.randn(m, m // 8) @ bench.randn(m // 8, n)
        row["a gradient of few tokens"] = bool(torch.isfinite(kernels.gram_basis(thin)[0]).all())
        found[f"{m} x {n}"] = row
    return found


def shapes_of(size: str, layers: int) -> tuple[list[tuple[int, int]], list[tuple[int, ...]]]:
    """Return the shapes of what is projected and of what is not, of some layers."""
    width, inner, _, _ = SIZES[size]
    block = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    return block * layers, [(width,)] * (2 * layers + 1)


def peers(bench: Bench, low_rank: list[nn.Parameter], dense: list[nn.Parameter], rank: int) -> dict[str, Any]:
    """Return the published optimizers that are installed."""
    found: dict[str, Any] = {"torch AdamW (fused)": torch.optim.AdamW([*low_rank, *dense], lr=1e-6, fused=True)}
    group = {"rank": rank, "update_proj_gap": 10**9, "scale": 0.25, "proj_type": "std"}
    try:
        from galore_torch import GaLoreAdamW

        found["galore-torch GaLoreAdamW"] = GaLoreAdamW(
            [{"params": low_rank, **group}, {"params": dense}], lr=1e-6, no_deprecation_warning=True
        )
    except ImportError:
        pass
    try:
        from apollo_torch import APOLLOAdamW

        options = {**group, "proj": "random", "scale_type": "channel"}
        found["apollo-torch APOLLOAdamW"] = APOLLOAdamW([{"params": low_rank, **options}, {"params": dense}], lr=1e-6)
    except ImportError:
        pass
    return found


def measure_steps(bench: Bench) -> dict[str, Any]:
    """Time ordinary steps; optimizers take their turns on the same weights and gradients."""
    cases = [("60m", 8, 128), ("350m", 8, 256), ("1b", 4, 512), ("7b", 2, 1024)]
    found: dict[str, Any] = {}
    for size, layers, rank in [("tiny", 2, 8)] if bench.quick else cases:
        for dtype in (torch.float32, torch.bfloat16):
            matrices, rest = shapes_of(size, layers)
            low_rank, dense = (
                [nn.Parameter(bench.randn(*s, dtype=dtype, scale=0.02)) for s in x] for x in (matrices, rest)
            )
            for p in (*low_rank, *dense):
                p.grad = bench.randn(*p.shape, dtype=dtype, scale=1e-3)
            row = {}
            for name in NAMES:
                group = {"params": low_rank, "rank": rank, "update_proj_gap": 10**9, "stagger": False}
                ours = LowRankOptimizer([group, {"params": dense}], name, lr=1e-6)
                start = time.perf_counter()
                ours.step()
                bench.synchronize()
                row[name] = {"ms": bench.milliseconds(ours.step), "first, ms": 1e3 * (time.perf_counter() - start)}
                del ours
            for name, other in peers(bench, low_rank, dense, rank).items():
                other.step()
                row[name] = {"ms": bench.milliseconds(other.step)}
                del other
            found[f"{size}, {layers} layers, r = {rank}, {str(dtype).removeprefix('torch.')}"] = row
    return found


def model_of(bench: Bench, size: str, dtype: torch.dtype) -> PlainLlama:
    """Return a plain LLaMA on the device."""
    torch.manual_seed(0)
    return PlainLlama(size).to(bench.device, dtype)


def micro_batches(bench: Bench, model: PlainLlama, count: int, tokens: int) -> None:
    """Run the forward and backward passes of one step."""
    gen = torch.Generator().manual_seed(count)
    for _ in range(count):
        ids = torch.randint(model.vocabulary, (1, tokens), generator=gen).to(bench.device)
        (model(ids) / count).backward()


def measure_training(bench: Bench) -> dict[str, Any]:
    """Time whole steps of 16k tokens in bf16, and the optimizer's share of them."""
    size, count, tokens, rank = ("tiny", 2, 16, 8) if bench.quick else ("1b", 8, 2048, 512)
    found: dict[str, Any] = {}
    for name in ("adamw", *NAMES):
        model = model_of(bench, size, torch.bfloat16)
        if name == "adamw":
            optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        else:
            groups = param_groups(model, method=name, rank=rank, update_proj_gap=GAP)
            optimizer = LowRankOptimizer(groups, name, lr=1e-5)
        micro_batches(bench, model, count, tokens)
        first = bench.milliseconds(optimizer.step, repeats=1)
        optimizer.zero_grad()
        steps = 2 if bench.quick else 10
        whole, seconds = train(bench, model, optimizer, steps, count, tokens)
        found[name] = {
            "tokens per second": steps * count * tokens / whole,
            "optimizer, share": seconds / whole,
            "a step after the first, ms": first,
        }
        del model, optimizer
    return found


def train(bench: Bench, model: PlainLlama, optimizer: Any, steps: int, count: int, tokens: int) -> tuple[float, float]:
    """Train for some steps; return the seconds of all and those of the optimizer, for which the host waits."""
    start, seconds = time.perf_counter(), 0.0
    for _ in range(steps):
        micro_batches(bench, model, count, tokens)
        bench.synchronize()
        before = time.perf_counter()
        optimizer.step()
        bench.synchronize()
        seconds += time.perf_counter() - before
        optimizer.zero_grad()
    return time.perf_counter() - start, seconds


def measure_ahead(bench: Bench) -> dict[str, Any]:
    """Time training with all refreshes of two intervals, waited for and beside the steps (async_refresh)."""
    size, tokens, rank, gap = ("tiny", 16, 8, 4) if bench.quick else ("1b", 2048, 512, 20)
    found: dict[str, Any] = {}
    for ahead in (0, gap // 2):
        model = model_of(bench, size, torch.bfloat16)
        groups = param_groups(model, method=NAMES[0], rank=rank, update_proj_gap=gap, async_refresh=ahead)
        optimizer = LowRankOptimizer(groups, NAMES[0], lr=1e-5)
        train(bench, model, optimizer, 1, 1, tokens)  # the first bases are waited for
        whole, _ = train(bench, model, optimizer, 2 * gap, 1, tokens)
        found[f"async_refresh={ahead}"] = {"ms a step": 1e3 * whole / (2 * gap)}
        optimizer.state_dict()  # so that nothing goes on
        del model, optimizer
    return found


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Compare the peak of two training steps with what is estimated: weights, gradients, state, workspace."""
    size, tokens, rank = ("tiny", 16, 8) if bench.quick else ("1b", 256, 512)
    found: dict[str, Any] = {}
    for name in (*NAMES, "galore_i3s_adamw_layerwise"):
        model = model_of(bench, size, torch.bfloat16)
        held = counting.weight_bytes(model.parameters())

        def steps(model: PlainLlama = model, name: str = name) -> None:
            optimizer = LowRankOptimizer(param_groups(model, method=name, rank=rank), name, lr=1e-5)
            optimizer.train()
            for _ in range(2):
                micro_batches(bench, model, 1, tokens)
                optimizer.step()
                optimizer.zero_grad()

        peak = bench.peak(steps)
        declared = LowRankOptimizer(param_groups(model, method=name, rank=rank), name)
        state = sum(counting.state_bytes(declared.declared()))
        estimate = state + counting.gradient_bytes(declared.declared()) + workspace_bytes(declared.declared())
        found[name] = {"weights": held, "peak above weights": peak, "estimate above weights": estimate, "state": state}
        del model
    return found


def check_resume(bench: Bench) -> dict[str, Any]:
    """Tell whether runs that should be the same are, bit for bit."""

    def run(name: str, dtype: torch.dtype, cut: int | None = None) -> list[Tensor]:
        model = model_of(bench, "tiny", dtype)

        def made() -> LowRankOptimizer:
            groups = param_groups(model, method=name, rank=8, update_proj_gap=3, stagger=True)
            return LowRankOptimizer(groups, name, lr=1e-3)

        optimizer = made()
        for step in range(8):
            if step == cut:
                saved = optimizer.state_dict()
                optimizer = made()
                optimizer.load_state_dict(saved)
            optimizer.train()
            micro_batches(bench, model, 1, 16)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    def same(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    found: dict[str, Any] = {}
    for name in NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            once = run(name, dtype)
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = {
                "the same run twice": same(once, run(name, dtype)),
                "resumed after 5 steps": same(once, run(name, dtype, cut=5)),
                "layerwise": same(once, run(name + "_layerwise", dtype)),
            }
    return found


def check_identities(bench: Bench) -> dict[str, Any]:
    """Run the tests of identities and references with their weights on the device."""
    tests = [
        "tests/test_identities.py",
        "tests/test_equations.py",
        "tests/test_stacks.py",
        "tests/test_async_refresh.py",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not full", *(tests[:1] if bench.quick else tests)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HF_LOWRANK_DEVICE": bench.device.type}, capture_output=True, text=True
    )
    lines = (done.stdout + done.stderr).splitlines()[-15:]
    if done.returncode:
        raise RuntimeError("\n".join([f"the tests ended with exit code {done.returncode}", *lines]))
    return {"exit code": done.returncode, "last lines": lines}


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "kernels": measure_kernels,
    "refresh": measure_refresh,
    "steps": measure_steps,
    "training": measure_training,
    "ahead": measure_ahead,
    "memory": measure_memory,
    "resume": check_resume,
    "identities": check_identities,
}


def main() -> None:
    """Run the sections, one file each."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="tiny shapes: shows that everything runs")
    given = parser.parse_args()
    bench = Bench(torch.device(given.device), given.quick)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.sections.split(","):
        start, result = time.perf_counter(), environment(bench)
        try:
            result["results"] = SECTIONS[name](bench)
        except Exception:  # the other sections are worth having
            result["error"] = traceback.format_exc()
        result["seconds"] = time.perf_counter() - start
        (given.out / f"{name}.json").write_text(json.dumps(result, indent=1))
        print(f"{name}: {'failed' if 'error' in result else 'done'} in {result['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
