"""A checkpoint that moves between meshes: each launch loads what others have saved, goes on, and saves its own.

torchrun --nproc_per_node N worker_moves.py moves OUTPUT FOLDER:METHOD:KINDS...

FOLDER has a checkpoint of step 4 for every kind that was saved before; KINDS (separated by commas) are this launch's.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel


sys.path.insert(0, str(Path(__file__).parent))
import models  # noqa: E402
import worker_plans  # noqa: E402
from worker import HALF, main, single, start, whole  # noqa: E402


SIZES = {**worker_plans.SIZES, "experts": 2}
PLAN = {**worker_plans.PLAN, "embed": RowwiseParallel(input_layouts=Replicate())}
PLAN.pop("norm")
FULL = StateDictOptions(full_state_dict=True)


def made(kind):
    """Return the model on this launch's processes."""
    net, world = models.model(**SIZES), dist.get_world_size()
    if kind == "ddp":
        return DistributedDataParallel(net)
    if kind == "alone":
        return net
    mesh = init_device_mesh("cpu", (world,))
    if kind in ("hsdp", "both"):
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "model"))
    if kind == "both":
        parallelize_module(net, mesh["model"], PLAN)
        mesh = mesh["data"]
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def states(net, opt, options=None):
    return {
        "model": get_model_state_dict(net, options=options),
        "optim": get_optimizer_state_dict(net, opt, options=options),
    }


def same(a, b):
    """Whether two full state dicts hold the same bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def half(kind, name):
    net = made(kind)
    return net, models.optimizer(net, name, share_refreshes=kind == "ddp")


def proceed(net, opt, begin, kind):
    """Train to the end of this half."""
    parts = 2 if kind == "both" else 1  # processes that share a batch
    rank, world = dist.get_rank() // parts, dist.get_world_size() // parts
    for step in range(begin, begin + HALF):
        opt.zero_grad()
        models.loss_of(net, step, rank, world).backward()
        opt.step()


def moves(case):
    warnings.filterwarnings("ignore")
    folder, name, kinds = case.split(":")
    found = {}
    saved = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    alone = [p.detach() for p in single(name, sizes=SIZES)[0].parameters()]
    dist.barrier()
    for kind in kinds.split(","):
        for origin in saved:
            whole_state = torch.load(Path(folder) / f"{origin}.pt", weights_only=False)
            net, opt = half(kind, name)
            into = states(net, opt)
            dcp.load(into, checkpoint_id=Path(folder) / origin)
            set_model_state_dict(net, into["model"])
            set_optimizer_state_dict(net, opt, into["optim"])
            exact = same(states(net, opt, FULL)["optim"]["state"], whole_state["optim"]["state"])
            proceed(net, opt, HALF, kind)
            found[f"{origin} to {kind}"] = {
                "exact": exact,
                "displacement": models.displacement(whole(net), alone, start(**SIZES)),
            }
            if kind == "both":  # torch cannot distribute a whole over two cuts of one axis, where they are uneven
                continue
            other, again = half(kind, name)
            set_model_state_dict(other, whole_state["model"], options=FULL)
            set_optimizer_state_dict(other, again, whole_state["optim"], options=FULL)
            proceed(other, again, HALF, kind)
            found[f"{origin} to {kind}"]["full"] = models.displacement(whole(other), whole(net), start(**SIZES))
        net, opt = half(kind, name)
        proceed(net, opt, 0, kind)
        dcp.save(states(net, opt), checkpoint_id=Path(folder) / f"{kind}{dist.get_world_size()}")
        full = states(net, opt, FULL)
        if dist.get_rank() == 0:
            torch.save(full, Path(folder) / f"{kind}{dist.get_world_size()}.pt")
        dist.barrier()
    return found


if __name__ == "__main__":
    main(globals())
