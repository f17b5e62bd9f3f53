"""A process that holds nothing of a head of two rows: the fourth of four, alone, beside others that are not there.

python worker_empty.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_lowrank import LowRankOptimizer


def piece(dtype):
    local = torch.empty(0, 5, dtype=dtype)
    return DTensor.from_local(local, mesh, [Shard(0)], shape=torch.Size((2, 5)), stride=(5, 1))


dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
mesh = init_device_mesh("cpu", (4,))
for dtype, form in ((torch.float32, "fp32"), (torch.bfloat16, "fp32"), (torch.float32, "8bit")):
    p = torch.nn.Parameter(piece(dtype))
    optimizer = LowRankOptimizer([{"params": [p], "dense_state_format": form}], "full_adamw")
    for _ in range(2):
        p.grad = piece(dtype)
        optimizer.step()
    print(int(optimizer.state[p]["step"]))
