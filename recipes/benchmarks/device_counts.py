"""What a step asks of a GPU, for every method, counted on fake CUDA tensors of true shapes: no GPU is needed.

    python recipes/benchmarks/device_counts.py --sizes 7b                 # the three methods that users take most
    python recipes/benchmarks/device_counts.py --sizes 60m,7b --methods all --markdown counts.md

For a LLaMA of each size with embeddings and head dense: launches, syncs, matrix products, bytes and the largest tensor
of an ordinary step, launches and syncs of the first step and of one in which every matrix is refreshed. Beside them
the roofline of a GPU: milliseconds of launches (6 microseconds each, the host's share), of bytes and of products, and
which of them bounds the step. `needed` are the bytes of two reads and one write of what the weights take (gradient,
weight), of reading and writing the state of the step once, of the basis twice and of R and N once each way.

These are counts and what would follow from them. Nothing here was timed on a GPU.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from hf_lowrank import METHODS, LowRankOptimizer  # noqa: E402
from hf_lowrank.methods import resolve  # noqa: E402
from hf_lowrank.planning.workspace import workspace_bytes  # noqa: E402
from recipes.benchmarks.fake_cuda import DEVICE, Counted, fake_cuda  # noqa: E402
from recipes.benchmarks.shapes import shapes  # noqa: E402


RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}
USUAL = ("galore_i3s_adamw", "fira_adamw", "apollo_random_adamw")
GAP = 3
SECONDS_PER_LAUNCH = 6e-6


@dataclass(frozen=True)
class Device:
    """What a GPU can do, by its data sheet and the share of it that kernels are known to reach.

    Attributes:
        bandwidth: bytes per second, 85 % of the data sheet's.
        flops: floating-point operations per second by type of what is multiplied.
    """

    bandwidth: float
    flops: dict[str, float]


FLOPS = {"float32": 52e12, "bfloat16": 650e12, "float64": 50e12}
DEVICES = {"H100": Device(0.85 * 3.35e12, FLOPS), "H200": Device(0.85 * 4.8e12, FLOPS)}


@dataclass(frozen=True)
class Counts:
    """The counts of three kinds of steps, the bytes that an ordinary one cannot do without, and the estimate of what
    a step allocates for a moment."""

    first: Counted
    ordinary: Counted
    refresh: Counted
    needed: int
    workspace: int


def fitting(name: str, rank: int, **options: Any) -> dict[str, Any]:
    """Return options of a group of matrices: those given, where the method has them."""
    default = METHODS[name].defaults.get("rank", 128)
    known = resolve.complete(name, {"rank": default})
    wanted = {
        "rank": rank if default >= 1 else default,
        "update_proj_gap": GAP,
        "stagger": False,
        "total_steps": 100,
        **options,
    }
    return {key: value for key, value in wanted.items() if key in known}


def counted(
    name: str, size: str, dtype: torch.dtype, *, layers: int | None = None, refresh: bool = True, **options: Any
) -> Counts:
    """Count steps of a LLaMA of a size.

    Args:
        name: the method.
        size: of LLAMA.
        dtype: of weights and gradients.
        layers: how many of its layers; default all.
        refresh: whether to go on to a step that refreshes; without, its counts are those of the ordinary one.
        options: of the group of matrices.
    """
    matrices, dense = shapes(size, layers)
    with fake_cuda():
        low_rank, rest = (
            [nn.Parameter(torch.empty(s, dtype=dtype, device=DEVICE)) for s in some] for some in (matrices, dense)
        )
        group = {"params": low_rank, **fitting(name, RANKS[size], **options)}
        optimizer = LowRankOptimizer([group, {"params": rest}], name)
        steps = []
        for _ in range(GAP + 1 if refresh else 2):
            for p in (*low_rank, *rest):
                p.grad = torch.empty_like(p)
            with Counted() as step:
                optimizer.step()
            steps.append(step)
        needed = sum(needed_bytes(optimizer, p) for p in (*low_rank, *rest))
    return Counts(steps[0], steps[1], steps[-1], needed, workspace_bytes(optimizer.declared()))


def needed_bytes(optimizer: LowRankOptimizer, p: nn.Parameter) -> int:
    """Return the bytes that a step of one parameter cannot do without."""
    plan = optimizer.plan(p)
    bytes_ = 3 * p.numel() * p.element_size()
    for buffer in plan.kept.values():
        if not buffer.slot.host:
            bytes_ += 2 * buffer.nbytes
    if plan.layout is not None:
        bytes_ += 4 * 4 * plan.r * plan.layout.n
    return bytes_


def roofline(step: Counted, device: Device) -> tuple[float, float, float]:
    """Return milliseconds of launches, of bytes and of products."""
    products = sum(count / device.flops.get(kind, device.flops["float32"]) for kind, count in step.flops.items())
    return sum(step.launches.values()) * SECONDS_PER_LAUNCH * 1e3, step.bytes / device.bandwidth * 1e3, products * 1e3


HEAD = (
    "method | size | dtype | launches | syncs | TFLOP | GB | of needed | largest, M elements | "
    "launches, syncs: first | refresh of all | "
    + " | ".join(f"{name}: launches, bytes, products, ms" for name in DEVICES)
    + " | bound by"
)


def row(name: str, size: str, dtype: torch.dtype, counts: Counts) -> str:
    """Return a line of the table."""
    step = counts.ordinary

    def of(one: Counted) -> str:
        return f"{sum(one.launches.values()):,}, {sum(one.syncs.values())}"

    lines = [roofline(step, device) for device in DEVICES.values()]
    bound = dict(zip(("launches", "bytes", "products"), lines[0], strict=True))
    cells = (
        name,
        size.upper(),
        str(dtype).removeprefix("torch."),
        f"{sum(step.launches.values()):,}",
        sum(step.syncs.values()),
        f"{sum(step.flops.values()) / 1e12:.2f}",
        f"{step.bytes / 1e9:.1f}",
        f"{step.bytes / counts.needed:.2f}",
        f"{step.largest[0] / 1e6:.1f}",
        of(counts.first),
        of(counts.refresh),
        *(", ".join(f"{ms:.1f}" for ms in line) for line in lines),
        max(bound, key=bound.__getitem__),
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def table(methods: list[str], sizes: list[str], dtypes: list[torch.dtype]) -> Iterator[str]:
    """Yield the table, line by line."""
    yield f"| {HEAD} |"
    yield "|" + "---|" * len(HEAD.split(" | "))
    for size in sizes:
        for name in methods:
            for dtype in dtypes:
                yield row(name, size, dtype, counted(name, size, dtype))


def main() -> None:
    """Print the table."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="7b", help=", ".join(RANKS))
    parser.add_argument("--methods", default=",".join(USUAL), help="names with commas, or all")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--markdown", help="a file for the table")
    given = parser.parse_args()
    methods = sorted(METHODS) if given.methods == "all" else given.methods.split(",")
    dtypes = [getattr(torch, dtype) for dtype in given.dtypes.split(",")]
    lines = []
    for line in table(methods, given.sizes.split(","), dtypes):
        print(line, flush=True)
        lines.append(line)
    if given.markdown:
        Path(given.markdown).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
