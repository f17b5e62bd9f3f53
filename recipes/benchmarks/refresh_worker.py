"""One process of distributed_refresh.py: refreshes all matrices of a LLaMA at every step."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from contestants import LR
from shapes import problem

from hf_lowrank import LowRankOptimizer


def main() -> None:
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
    main()
