"""The refresh under DDP, shared out over processes of one thread each: this file, started as a script, is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from contestants import LR
from shapes import problem
from tables import Section, Target
from timing import Samples

from hf_lowrank import LowRankOptimizer


def section(size: str, rank: int, *, quick: bool) -> Section:
    """Time a refresh of all matrices on one process and on two, alternating; count the work of four."""
    result = Section(f"Refresh of all matrices under DDP: LLaMA-{size.upper()}, one thread a process")
    times, shares = {1: Samples(), 2: Samples()}, dict[int, list[float]]()
    for _ in range(1 if quick else 3):
        for processes in times:
            answer = launch(processes, size, rank, steps=2 if quick else 3)
            times[processes].values += answer["milliseconds"]
            shares[processes] = answer["shares"]
    if not quick:
        shares[4] = launch(4, size, rank, steps=1)["shares"]
    for processes, work in shares.items():
        shown = {"processes": processes, "ms": None, "quartiles": None}
        if processes in times:
            shown |= {"ms": round(times[processes].median, 1), "quartiles": times[processes].spread}
        result.rows.append({**shown, "share of the work, counted": ", ".join(f"{x:.3f}" for x in work)})
    value = times[2].median / times[1].median
    spread = f"{times[2].spread} against {times[1].spread} ms, n = {len(times[1].values)}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    result.remarks.append(f"{cores} cores for these processes")
    result.targets.append(Target("refresh under DDP, 2 processes / 1", 0.6, round(value, 3), spread))
    most = max(shares[4]) if 4 in shares else None
    result.targets.append(Target("largest share of four processes, counted", 0.26, most, "exact"))
    return result


def launch(processes: int, size: str, rank: int, *, steps: int, script: str = __file__) -> dict[str, list[float]]:
    """Run this file, or another, on some processes of one thread each, and return what the first one reports."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, script, size, str(rank), str(steps)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        raise RuntimeError(f"the worker failed on {processes} processes:\n{done.stderr[-2000:]}")
    answer: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def work() -> None:
    """Print the milliseconds of every refresh after the first, and every process's share of all refreshes."""
    size, rank, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    matrices, dense = problem(size, torch.float32, "cpu").parameters()
    group = {"params": matrices, "rank": rank, "update_proj_gap": 1}
    optimizer = LowRankOptimizer([group], "galore_i3s_adamw", lr=LR, share_refreshes=dist.get_world_size() > 1)
    chosen = count_work()
    times = []
    for _ in range(steps + 1):
        before = optimizer.refresh_seconds
        dist.barrier()
        optimizer.step()
        times.append(1e3 * (optimizer.refresh_seconds - before))
    every: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(every, sum(chosen))
    if dist.get_rank() == 0:
        print(json.dumps({"milliseconds": times[1:], "shares": [x / sum(every) for x in every]}))
    dist.destroy_process_group()


def count_work() -> list[float]:
    """Have every decomposition on this process note its multiplications, m^2 n."""
    from hf_lowrank.tensors import kernels

    noted: list[float] = []
    original = kernels.gram_basis

    def counting(G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noted.append(min(G.shape) ** 2 * float(max(G.shape)))
        return original(G)

    kernels.gram_basis = counting
    return noted


if __name__ == "__main__":
    work()
