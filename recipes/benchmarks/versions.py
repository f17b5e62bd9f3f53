"""Time the ordinary steps of two versions of this package in turn: is anything slower than it was?

    git clone . runs/before && git -C runs/before checkout 557bf80
    python recipes/benchmarks/versions.py --before runs/before --sizes 9m,60m --dtypes float32

Each version has a process of its own, and both take turns, a few steps each, so that a disturbance hits both alike:
trust the ratios. Time is that of the processor. `--before` may be any checkout whose `LowRankOptimizer` has the names
that are asked for; the subspaces are chosen in the first step alone, which is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any


HERE = Path(__file__).resolve().parent
GAP, NEVER = "update_proj_gap", 10**6
NAMES = "galore_dominant_adamw,galore_i3s_adamw,fira_adamw,fira_i3s_adamw,apollo_random_adamw,apollo_mini_adamw,"
NAMES += "subtrack_adamw,ldadam,galore_i3s_adamw_8bit"
RANKS = {"9m": 32, "60m": 128, "130m": 256, "350m": 256}
LAYERS = 2
"""Layers that are stepped, for the sizes whose whole model would take gigabytes in two processes."""


def serve(task: dict[str, Any]) -> None:
    """Be one version: make the optimizer, then run as many steps as each line of the input says; print their ms."""
    import torch

    from hf_lowrank import LowRankOptimizer

    torch.set_num_threads(task["threads"])
    gen = torch.Generator().manual_seed(0)

    def weight(shape: Sequence[int]) -> torch.nn.Parameter:
        p = torch.nn.Parameter((0.02 * torch.randn(*shape, generator=gen)).to(getattr(torch, task["dtype"])))
        p.grad = (1e-3 * torch.randn(*shape, generator=gen)).to(p.dtype)
        return p

    matrices = {"params": [weight(shape) for shape in task["matrices"]], **task["options"]}
    dense = {"params": [weight(shape) for shape in task["dense"]]}
    optimizer = LowRankOptimizer([matrices, dense], task["name"], lr=1e-6)
    for _ in range(3):
        optimizer.step()
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.process_time()
        for _ in range(int(line)):
            optimizer.step()
        print(1e3 * (time.process_time() - start) / int(line), flush=True)


class Version:
    """A process that steps as one checkout of the package does."""

    def __init__(self, folder: Path, task: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(folder.resolve()), "OMP_NUM_THREADS": str(task["threads"])}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", json.dumps(task)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )
        if self._line() != "ready":
            raise SystemExit(f"{task['name']} does not run in {folder}: what it printed says why.")

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def steps(self, count: int) -> float:
        """Return the mean milliseconds of so many steps."""
        assert self.process.stdin
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def compare(before: Path, now: Path, task: dict[str, Any], rounds: int, seconds: float) -> tuple[float, ...]:
    """Return the median milliseconds before, and the quartiles of now / before, over turns of so many seconds."""
    both = [Version(before, task), Version(now, task)]
    try:
        count = max(1, round(1e3 * seconds / both[0].steps(2)))
        times = [[], []]  # type: list[list[float]]
        for turn in range(rounds):
            for i in (0, 1) if turn % 2 else (1, 0):
                times[i].append(both[i].steps(count))
    finally:
        for version in both:
            version.close()
    return quantiles(times[0], n=4)[1], *quantiles([b / a for a, b in zip(*times, strict=True)], n=4)


def main() -> None:
    """Print a line for every method, size and type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the version that this one is compared with")
    parser.add_argument("--now", type=Path, default=HERE.parents[1], help="checkout of the other; default: this one")
    parser.add_argument("--names", default=NAMES, help="methods, separated by commas")
    parser.add_argument("--sizes", default="9m,60m", help="of LLaMA; all layers of 9m, two of the others")
    parser.add_argument("--dtypes", default="float32", help="of weights and gradients")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each version")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a turn")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    if args.before is None:
        parser.error("--before says which checkout to compare with")
    from shapes import shapes

    from hf_lowrank import METHODS
    from hf_lowrank.methods import resolve

    print("| matrices | dtype | method | before, ms | now / before | quartiles |\n|---|---|---|---:|---:|---:|")
    for size in args.sizes.split(","):
        matrices, dense = shapes(size, None if size == "9m" else LAYERS)
        for dtype in args.dtypes.split(","):
            for name in args.names.split(","):
                own = {k: v for k, v in METHODS[resolve.split(name)[0]].defaults.items() if k in ("rank", GAP)}
                options = {"rank": RANKS[size], GAP: NEVER, "stagger": False, **own}
                task = {"name": name, "dtype": dtype, "threads": args.threads, "options": options}
                task |= {"matrices": matrices, "dense": dense}
                ms, low, middle, high = compare(args.before, args.now, task, args.rounds, args.seconds)
                row = f"| {size} | {dtype} | `{name}` | {ms:.1f} | {middle:.2f} | {low:.2f} to {high:.2f} |"
                print(row, flush=True)
    return None


if __name__ == "__main__":
    main()
