"""Time an optimizer step beside the published packages and the floor, interleaved in one run.

The gradients are random and stay the same; what is timed is `optimizer.step()` alone, on the shapes of a LLaMA. An
ordinary step refreshes nothing. The floor is the two matrix products of every projected matrix, written in place, plus
torch's fused AdamW on the dense parameters: what no method of this kind can do without.

    python recipes/benchmarks/step_time.py --size 60m --rank 128 --threads 2 --json results.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from hf_lowrank import LowRankOptimizer


SIZES = {"9m": (128, 352, 4), "60m": (512, 1376, 8), "130m": (768, 2048, 12), "350m": (1024, 2736, 24)}
"""Hidden size, intermediate size, layers of the LLaMA models of the GaLore paper."""
VOCABULARY = 32000
NEVER = 10**9


def shapes(size: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of the projected matrices and of the dense parameters."""
    hidden, intermediate, layers = SIZES[size]
    block = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return block * layers, [(VOCABULARY, hidden)] * 2 + [(hidden,)] * (2 * layers + 1)


class Contestant:
    """One optimizer with its own parameters, and the milliseconds of its steps."""

    def __init__(
        self, name: str, size: str, dtype: torch.dtype, device: str, make: Callable[..., Callable[[], object]]
    ):
        matrices, dense = shapes(size)
        self.name, self.times, self.device = name, list[float](), device
        gen = torch.Generator().manual_seed(0)
        self.matrices = [self._parameter(shape, gen, dtype) for shape in matrices]
        self.dense = [self._parameter(shape, gen, dtype) for shape in dense]
        self.step = make(self.matrices, self.dense)
        self.first = self._time()  # with its refresh, where the method has one

    def _parameter(self, shape: tuple[int, ...], gen: torch.Generator, dtype: torch.dtype) -> Tensor:
        p = torch.nn.Parameter((0.02 * torch.randn(shape, generator=gen)).to(self.device, dtype))
        p.grad = (1e-3 * torch.randn(shape, generator=gen)).to(self.device, dtype)
        return p

    def _time(self) -> float:
        synchronize = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        synchronize()
        start = time.perf_counter()
        self.step()
        synchronize()
        return 1e3 * (time.perf_counter() - start)

    def measure(self) -> None:
        """Time one more step."""
        self.times.append(self._time())


def contestants(rank: int) -> dict[str, Callable[..., Callable[[], object]]]:
    """Return the ways to make a step function from (matrices, dense parameters)."""
    options = {"rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std"}

    def floor(matrices: list[Tensor], dense: list[Tensor]) -> Callable[[], object]:
        adamw = torch.optim.AdamW(dense, lr=1e-4, weight_decay=0.0, fused=True)
        wide = [(p.data.mT, p.grad.mT) if p.shape[0] >= p.shape[1] else (p.data, p.grad) for p in matrices]
        bases = [torch.linalg.qr(torch.randn(w.shape[0], rank, device=w.device, dtype=w.dtype))[0] for w, _ in wide]

        def step() -> None:
            adamw.step()
            for (W, G), P in zip(wide, bases, strict=True):
                W.addmm_(P, P.mT @ G, alpha=-1e-6)

        return step

    def ours(method: str) -> Callable[..., Callable[[], object]]:
        def make(matrices: list[Tensor], dense: list[Tensor]) -> Callable[[], object]:
            groups = [{"params": matrices, **options}, {"params": dense}]
            return LowRankOptimizer(groups, method, lr=1e-4).step

        return make

    def adamw(matrices: list[Tensor], dense: list[Tensor]) -> Callable[[], object]:
        return torch.optim.AdamW([*matrices, *dense], lr=1e-4, fused=True).step

    def galore_torch(matrices: list[Tensor], dense: list[Tensor]) -> Callable[[], object]:
        from galore_torch import GaLoreAdamW

        groups = [{"params": dense}, {"params": matrices, **options}]
        return GaLoreAdamW(groups, lr=1e-4, no_deprecation_warning=True).step

    def fira(matrices: list[Tensor], dense: list[Tensor]) -> Callable[[], object]:
        from fira import FiraAdamW

        groups = [
            {"params": dense},
            {"params": matrices, **{("alpha" if k == "scale" else k): v for k, v in options.items()}},
        ]
        return FiraAdamW(groups, lr=1e-4, no_deprecation_warning=True).step

    return {
        "floor": floor,
        "torch AdamW (fused)": adamw,
        "galore_dominant_adamw": ours("galore_dominant_adamw"),
        "galore_i3s_adamw": ours("galore_i3s_adamw"),
        "fira_adamw": ours("fira_adamw"),
        "fira_i3s_adamw": ours("fira_i3s_adamw"),
        "galore-torch 1.0": galore_torch,
        "fira 1.0.2": fira,
    }


RATIOS = (("galore_i3s_adamw", "galore-torch 1.0"), ("fira_i3s_adamw", "fira 1.0.2"))
"""Ours over the published package, printed under the table."""


def summarize(runs: list[Contestant]) -> list[dict[str, object]]:
    """Return one row per contestant: medians, spread, first step, ratio to the floor."""
    floor = statistics.median(runs[0].times)
    rows = []
    for run in runs:
        median, quartiles = statistics.median(run.times), statistics.quantiles(run.times, n=4)
        rows.append(
            {
                "optimizer": run.name,
                "ordinary step ms": round(median, 1),
                "quartiles ms": f"{quartiles[0]:.1f}-{quartiles[2]:.1f}",
                "x floor": round(median / floor, 2),
                "first step ms": round(run.first, 1),
            }
        )
    return rows


def markdown(rows: list[dict[str, object]]) -> str:
    """Return rows as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the same numbers with versions and device")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", module="fira|galore_torch")
    runs = []
    for name, make in contestants(args.rank).items():
        try:
            runs.append(Contestant(name, args.size, getattr(torch, args.dtype), args.device, make))
        except (ImportError, RuntimeError) as error:
            print(f"{name}: not measured ({type(error).__name__}: {str(error).splitlines()[0]})")
    for _ in range(args.repeats + 2):
        for run in runs:
            run.measure()
    for run in runs:
        del run.times[:2]  # warm-up
    rows = summarize(runs)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor()} CPU"
    setting = f"LLaMA-{args.size}, rank {args.rank}, {args.dtype}, {args.threads} threads, {device}"
    print(f"{setting}; medians of {args.repeats} interleaved steps\n\n{markdown(rows)}\n")
    medians = {run.name: statistics.median(run.times) for run in runs}
    for ours, theirs in RATIOS:
        if theirs in medians:
            print(f"{ours} / {theirs}: {medians[ours] / medians[theirs]:.2f}")
    if args.json:
        versions = {name: _version(name) for name in ("torch", "hf_lowrank", "galore-torch", "fira")}
        args.json.write_text(json.dumps({"setting": setting, "versions": versions, "rows": rows}, indent=2) + "\n")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
