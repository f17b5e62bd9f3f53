"""Plain DDP beside sharded state on several processes of one thread each: this file, started as a script, is one.

python recipes/benchmarks/run.py --sections sharded
torchrun --nproc_per_node 2 recipes/benchmarks/sharded_state.py 60m 128 10
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter

import torch
import torch.distributed as dist
from contestants import LR
from distributed_refresh import launch
from shapes import problem
from tables import Section, Target
from timing import Samples

from hf_lowrank import LowRankOptimizer
from hf_lowrank.state import view


METHOD, MIB = "galore_i3s_adamw", 2**20
MODES: dict[str, dict[str, bool]] = {"plain DDP": {"share_refreshes": True}, "shard_state": {"shard_state": True}}


def section(size: str, rank: int, *, quick: bool) -> Section:
    """Time the step of plain DDP and of sharded state on two processes, which take turns, and count the state."""
    result = Section(f"Sharded state under DDP: LLaMA-{size.upper()}, {METHOD}, 2 processes, one thread each")
    answer = launch(2, size, rank, steps=2 if quick else 20, script=__file__)
    for mode in MODES:
        times, held = Samples(answer[f"{mode} ms"]), answer[f"{mode} bytes"]
        row = {"mode": mode, "ms": round(times.median, 1), "quartiles": times.spread}
        result.rows.append({**row, "MiB of state": ", ".join(f"{x / MIB:.1f}" for x in held)})
    most = max(answer["shard_state bytes"]) / answer["plain DDP bytes"][0]
    ratios = Samples([b / a for a, b in zip(*(answer[f"{mode} ms"] for mode in MODES), strict=True)])
    result.remarks.append("an ordinary step without the all-reduce of gradients, which is the same in both")
    result.targets.append(Target("state of one of two processes / plain DDP", 0.55, round(most, 3), "exact"))
    result.targets.append(
        Target("step with sharded state / plain DDP, 2 processes", None, round(ratios.median, 3), ratios.spread)
    )
    return result


def work() -> None:
    """Print the milliseconds of every ordinary step of both modes, and the bytes of every process's state."""
    size, rank, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    optimizers = {}
    for mode, shared in MODES.items():
        matrices, dense = problem(size, torch.float32, "cpu").parameters()
        groups = [{"params": matrices, "rank": rank, "update_proj_gap": 10**6}, {"params": dense}]
        optimizers[mode] = LowRankOptimizer(groups, METHOD, lr=LR, **shared)
        optimizers[mode].step()  # which refreshes
    answer: dict[str, list[float]] = {f"{mode} ms": [] for mode in MODES}
    for _ in range(steps):
        for mode, optimizer in optimizers.items():
            dist.barrier()
            start = perf_counter()
            optimizer.step()
            dist.barrier()
            answer[f"{mode} ms"].append(1e3 * (perf_counter() - start))
    for mode, optimizer in optimizers.items():
        every: list[float] = [0.0] * dist.get_world_size()
        dist.all_gather_object(every, sum(map(view.nbytes, optimizer.state.values())))
        answer[f"{mode} bytes"] = every
    if dist.get_rank() == 0:
        print(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a normal exit


if __name__ == "__main__":
    work()
