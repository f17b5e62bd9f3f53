"""Measure hf_lowrank beside the published packages and floors of bare kernels, and print tables, targets and JSON.

    python recipes/benchmarks/run.py --json results.json
    python recipes/benchmarks/run.py --quick

Everything that is compared is interleaved in one run, so that a disturbance hits all alike: trust the ratios, not the
milliseconds. Gradients are random unless said. The default takes more than an hour on two CPU cores, --quick a minute
or so on a tiny model, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import distributed_refresh
import memory_tables
import refresh
import sharded_state
import steps
import tables
import timing
import torch
import training
from contestants import AS_GALORE_TORCH, FLOORS, OURS, PEERS, Contestant, Setup, ours, quiet
from shapes import problem
from tables import Section

from hf_lowrank.hf.models import VOCABULARY


RANKS = {"9m": 32, "60m": 128, "130m": 256, "350m": 256}


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    sizes: list[str]
    dtypes: list[str]
    device: str
    threads: int
    optimizers: list[str]
    quick: bool

    @property
    def first(self) -> str:
        """The size that the targets are about."""
        return self.sizes[0]

    @property
    def layers(self) -> int | None:
        """Layers of it that are measured; None for all."""
        return 1 if self.quick else None

    @property
    def vocabulary(self) -> int:
        """Tokens of the models."""
        return 2000 if self.quick else VOCABULARY

    @property
    def rank(self) -> int:
        """Its rank."""
        return RANKS[self.first]


def contestants(patterns: list[str], dtype: str) -> list[Contestant]:
    """Return floors, our optimizers and the published ones whose name matches, for weights of a type."""
    from hf_lowrank.methods import resolve

    mine = OURS if patterns == ["default"] else resolve.names()
    chosen = ["*"] if patterns == ["default"] else patterns
    everyone = [*map(ours, mine), *([AS_GALORE_TORCH] if dtype == "bfloat16" else []), *PEERS]
    return [*FLOORS, *(one for one in everyone if any(fnmatch(one.name, pattern) for pattern in chosen))]


def step_sections(plan: Plan) -> Iterator[Section]:
    """Measure steps for every size and type; only the first size has all of its layers."""
    for size in plan.sizes:
        for dtype in plan.dtypes:
            layers = plan.layers if size == plan.first else 2
            setup = Setup(RANKS[size], 6 if plan.quick else 20)
            posed = problem(size, getattr(torch, dtype), plan.device, layers, plan.vocabulary)
            intervals, seconds = (2, 2.0) if plan.quick else (3 if size == plan.first else 2, 180.0)
            measured, remarks = steps.measure(
                posed,
                contestants(plan.optimizers, dtype),
                setup,
                intervals=intervals,
                device=plan.device,
                seconds=seconds,
            )
            section = steps.section(posed, measured, remarks, setup)
            if size == plan.first:
                section.targets = steps.targets(posed, measured, setup)
            steps.release(measured)
            yield section


SECTIONS: dict[str, Callable[[Plan], Iterable[Section]]] = {
    "steps": step_sections,
    "bytes": lambda plan: [memory_tables.section(quick=plan.quick)],
    "refresh": lambda plan: refresh.sections(plan.device, quick=plan.quick),
    "stagger": lambda plan: [steps_over_intervals(plan)],
    "training": lambda plan: training.sections(plan.first, plan.rank, plan.device, quick=plan.quick),
    "subtrack": lambda plan: [refresh.wall_time(plan.first, plan.device, quick=plan.quick)],
    "distributed": lambda plan: [distributed_refresh.section(plan.first, plan.rank, quick=plan.quick)],
    "sharded": lambda plan: [sharded_state.section(plan.first, plan.rank, quick=plan.quick)],
}


def steps_over_intervals(plan: Plan) -> Section:
    """Measure the worst step with staggered refreshes."""
    gap = 20 if plan.quick else 200
    posed = problem(plan.first, torch.float32, plan.device, plan.layers, plan.vocabulary)
    return steps.staggered(posed, Setup(plan.rank, gap), plan.device)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", help="LLaMA sizes, the targets on the first. Default: 60m,130m,350m")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--optimizers", default="default", help="patterns of names; '*' for every method and peer")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="Default: %(default)s")
    parser.add_argument("--clock", choices=timing.CLOCKS, default="wall", help="cpu: for one thread on a busy machine")
    parser.add_argument("--quick", action="store_true", help="a tiny model, a few repeats")
    parser.add_argument("--json", type=Path, help="file for the same numbers with versions, threads and device")
    parser.add_argument("--markdown", type=Path, help="file for what is printed")
    args = parser.parse_args()
    for what, names, valid in (("sizes", args.sizes or "60m", RANKS), ("sections", args.sections, SECTIONS)):
        if unknown := sorted(set(names.split(",")) - set(valid)):
            parser.error(f"--{what}: unknown {', '.join(unknown)}; valid: {', '.join(valid)}")
    if args.clock == "cpu" and (args.device == "cuda" or args.threads > 1):
        parser.error("--clock cpu: for --device cpu and --threads 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    return args


def main() -> None:
    """Measure and print."""
    args = arguments()
    quiet()
    torch.set_num_threads(args.threads)
    timing.use_clock(args.clock)
    sizes_wanted = (args.sizes or ("9m" if args.quick else "60m,130m,350m")).split(",")
    plan = Plan(
        sizes_wanted, args.dtypes.split(","), args.device, args.threads, args.optimizers.split(","), args.quick
    )
    where, start, found = tables.setting(args.device, args.threads), time.perf_counter(), list[Section]()
    command = shlex.join(["python", *sys.argv])
    shown = [f"# Benchmarks\n\n`{command}`\n\n{json.dumps(where)}"]
    print(shown[0], flush=True)
    for name in args.sections.split(","):
        for section in SECTIONS[name](plan):
            found.append(section)
            shown.append(section.markdown())
            print(f"\n{shown[-1]}", flush=True)
            _write(args, found, where, command, shown)  # what is measured is kept if a later section is stopped
    shown.append(f"{tables.targets_table(found)}\n\n{time.perf_counter() - start:.0f} s in all")
    print(f"\n{shown[-1]}")
    _write(args, found, where, command, shown)


def _write(
    args: argparse.Namespace, found: list[Section], where: dict[str, object], command: str, shown: list[str]
) -> None:
    if args.json:
        args.json.write_text(json.dumps(tables.as_json(found, where, command), indent=2) + "\n")
    if args.markdown:
        args.markdown.write_text("\n\n".join(shown) + "\n")


if __name__ == "__main__":
    main()
