"""Bytes that replicas average in a step: DistributedDataParallel's, and with projected gradients. Counted, not timed.

    torchrun --nproc_per_node 2 recipes/benchmarks/replica_traffic.py [SIZE] [RANK]

The bytes are those of the tensors that each process hands to a collective, of any library and any number of processes.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import LowRankOptimizer, exclude_from_ddp, llama_config, param_groups


MIB = 2**20
GAP = 200
"""Steps between refreshes, for the mean over an interval."""


class Counted:
    """Bytes of the collectives since the last call of `taken`."""

    def __init__(self) -> None:
        self.bytes = 0

    def taken(self) -> int:
        """Return the bytes, and start anew."""
        found, self.bytes = self.bytes, 0
        return found

    def hook(self, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Average a bucket of DistributedDataParallel's, as it does by itself."""
        flat = bucket.buffer()
        self.bytes += flat.nbytes
        flat.div_(dist.get_world_size())
        return dist.all_reduce(flat, async_op=True).get_future().then(lambda future: future.value()[0])

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what the optimizer sends."""
        originals = {name: getattr(dist, name) for name in ("all_reduce", "broadcast")}

        def counting(original: Callable[..., Any]) -> Callable[..., Any]:
            def collective(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
                self.bytes += tensor.nbytes
                return original(tensor, *arguments, **keywords)

            return collective

        for name, original in originals.items():
            setattr(dist, name, counting(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)


def measured(size: str, rank: int, dtype: torch.dtype, *, reduced: bool) -> tuple[int, int]:
    """Return the bytes of a step at which every basis is refreshed, and of an ordinary one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**llama_config(size))).to(dtype)
    groups = param_groups(model, rank=rank, update_proj_gap=GAP, stagger=False, reduce_projected=reduced)
    optimizer = LowRankOptimizer(groups, "galore_i3s_adamw", share_refreshes=True)
    exclude_from_ddp(model, optimizer)
    counted, parallel = Counted(), DistributedDataParallel(model)
    parallel.register_comm_hook(None, counted.hook)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        ids = torch.arange(16).view(1, 16)
        parallel(input_ids=ids, labels=ids).loss.backward()
        with counted.watching():
            optimizer.step()
        found.append(counted.taken())
    return found[0], found[1]


def main() -> None:
    """Print one row for each way."""
    size, rank = (sys.argv[1:] + ["60m", "128"][len(sys.argv) - 1 :])[:2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = [f"LLaMA-{size.upper()}, rank {rank}; MiB that a process hands to collectives in a step", ""]
    rows += [f"| weights | averaged | ordinary step | refresh of all | mean over {GAP} |", "|---|---|--:|--:|--:|"]
    for dtype in (torch.float32, torch.bfloat16):
        for reduced in (False, True):
            refresh, ordinary = measured(size, int(rank), dtype, reduced=reduced)
            mean = ((GAP - 1) * ordinary + refresh) / GAP
            name = "projected gradients" if reduced else "gradients"
            numbers = " | ".join(f"{x / MIB:.1f}" for x in (ordinary, refresh, mean))
            rows.append(f"| {str(dtype).removeprefix('torch.')} | {name} | {numbers} |")
    if dist.get_rank() == 0:
        print("\n".join(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
