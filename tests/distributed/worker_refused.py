"""What is said of weights that cannot be trained as they lie, when the optimizer is made.

torchrun --nproc_per_node 2 worker_refused.py refused OUTPUT all
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard


sys.path.insert(0, str(Path(__file__).parent))
from worker import main  # noqa: E402

from hf_lowrank import LowRankOptimizer  # noqa: E402


def refused(_):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def placed(placement, shape=(8, 12)):
        return nn.Parameter(DTensor.from_local(torch.ones(shape), mesh, [placement], run_check=False))

    def said(p, method, **options):
        group = {"params": [p], **options}
        try:
            LowRankOptimizer([group], method)
        except ValueError as error:
            return str(error)
        return None

    spec = DTensorSpec(  # as FSDP2's CPUOffloadPolicy leaves it
        DeviceMesh("cuda", torch.arange(2), _init_backend=False),
        (Shard(0),),
        tensor_meta=TensorMeta(torch.Size((8, 12)), (12, 1), torch.float32),
    )
    offloaded = nn.Parameter(DTensor(torch.ones(4, 12), spec, requires_grad=False))
    inputs, plain = placed(Shard(1)), nn.Parameter(torch.ones(8, 8))
    found = {
        "haar": said(inputs, "gwt_adamw", rank=0.5),
        "full": said(inputs, "galore_dominant_adamw", rank=2, proj_type="full"),
        "dense": said(inputs, "full_adamw", dense="column_norm"),
        "packed": said(placed(_StridedShard(0, split_factor=3)), "fira_adamw", rank=2),
        "partial": said(placed(Partial()), "fira_adamw", rank=2),
        "offload": said(offloaded, "fira_adamw", rank=2),
        "experts": said(placed(Shard(0), (2, 8, 12)), "galore_dominant_adamw", rank=2, proj_type="full"),
    }
    optimizer = LowRankOptimizer([{"params": [plain], "rank": 0.5}], "gwt_adamw")
    try:
        optimizer.add_param_group({"params": [inputs], "rank": 0.5})
    except ValueError as error:
        found["added"] = str(error)
    return found


if __name__ == "__main__":
    main(globals())
