"""State that moves between numbers of processes: saved in shards by some, read by others.

torchrun --nproc_per_node N worker_resharding.py STAGE OUTPUT METHOD...

STAGE is `equal` (beside one process), `begin` (train and save), `pass` (read, and save what was read) or `end` (read,
train on, and compare with the run that was never stopped, of which `begin` has written the end). The folder of OUTPUT
holds what is handed on. A METHOD may end in @large: a model of which moments, embedding and head have codes.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


sys.path.insert(0, str(Path(__file__).parent))
import models  # noqa: E402
import worker  # noqa: E402
from models import fitting  # noqa: E402

from hf_lowrank import LowRankOptimizer  # noqa: E402


BEFORE, AFTER = 5, 4  # gaps of 2 and 3: what is saved is in the middle of an interval
SIZES = {"": {"experts": 2}, "large": {"width": 72, "inner": 100, "experts": 2}}


def built(name, size):
    """A sharded model and its optimizer."""
    net = worker.sharded(**SIZES[size])
    rank = 64 if size else 3
    return net, models.optimizer(net, name, rank=rank, **worker.exact(name))


def whole_state(opt):
    """Every tensor of the state, whole."""
    return {
        (i, key): getattr(value, "full_tensor", lambda value=value: value)().clone()
        for i, p in enumerate(p for group in opt.param_groups for p in group["params"])
        for key, value in opt.state[p].items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def save(net, opt, folder):
    weights, state = get_state_dict(net, opt)
    dcp.save({"weights": weights, "state": state}, checkpoint_id=folder)


def load(net, opt, folder):
    weights, state = get_state_dict(net, opt)
    both = {"weights": weights, "state": state}
    dcp.load(both, checkpoint_id=folder)
    set_state_dict(net, opt, model_state_dict=both["weights"], optim_state_dict=both["state"])


def equal(name, size, folder):
    """Weights and gradients given, those of one process bit for bit: the codes of the steps that follow.

    Rows and columns are such that no kernel of one process ends where one of several does not.
    """
    shapes = {"tall": (144, 80), "wide": (80, 144), "stack": (6, 64, 96), "embedding": (96, 64)}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    gen = torch.Generator().manual_seed(0)
    start = {kind: torch.randn(shape, generator=gen) for kind, shape in shapes.items()}
    alone = {kind: torch.nn.Parameter(value.clone()) for kind, value in start.items()}
    split = {kind: torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for kind, value in start.items()}
    reference, opt = given(alone, name), given(split, name)
    for _ in range(BEFORE):
        for kind, p in alone.items():
            p.grad = torch.randn(p.shape, generator=gen)
            split[kind].grad = distribute_tensor(p.grad, mesh, [Shard(0)])
        reference.step()
        opt.step()
    states = whole_state(opt), whole_state(reference)
    moved = [[getattr(p, "full_tensor", lambda p=p: p)().detach() for p in some.values()] for some in (split, alone)]
    return {
        "displacement": models.displacement(*moved, list(start.values())),
        "same weights": all(torch.equal(a, b) for a, b in zip(*moved, strict=True)),
        "same state": same(*states),
        "coded": sum(value.dtype == torch.uint8 for value in states[0].values()),
    }


def given(weights, name):
    """An optimizer of the matrices among some weights, and of the embedding."""
    matrices = [p for kind, p in weights.items() if kind != "embedding"]
    groups = [
        {"params": matrices, **fitting(name, {"rank": 48, "update_proj_gap": 3})},
        {"params": [weights["embedding"]]},
    ]
    return LowRankOptimizer(groups, name, lr=1e-2)


def begin(name, size, folder):
    """Train to the middle of an interval, save, and train to the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    net, opt = built(name, size)
    models.train(net, opt, BEFORE, rank, world)
    save(net, opt, folder / "first")
    state, middle = whole_state(opt), worker.whole(net)
    models.train(net, opt, AFTER, rank, world, start=BEFORE)
    end = worker.whole(net)
    if rank == 0:
        torch.save({"state": state, "middle": middle, "end": end}, folder / "kept.pt")
    codes = [key for (_, key), value in state.items() if value.dtype == torch.uint8]
    return {"coded": len(codes)}


def pass_on(name, size, folder):
    net, opt = built(name, size)
    load(net, opt, folder / "first")
    kept = torch.load(folder / "kept.pt")
    save(net, opt, folder / "second")
    return {"same state": same(whole_state(opt), kept["state"])}


def end(name, size, folder):
    rank, world = dist.get_rank(), dist.get_world_size()
    net, opt = built(name, size)
    load(net, opt, folder / "second")
    kept = torch.load(folder / "kept.pt")
    found = {"same state": same(whole_state(opt), kept["state"])}
    models.train(net, opt, AFTER, rank, world, start=BEFORE)
    return found | {"displacement": models.displacement(worker.whole(net), kept["end"], kept["middle"])}


def staged(stage, output, names):
    results = {}
    for name in names:
        method, _, size = name.partition("@")
        folder = Path(output).parent / name
        if dist.get_rank() == 0:
            folder.mkdir(exist_ok=True)
        dist.barrier()
        results[name] = {"equal": equal, "begin": begin, "pass": pass_on, "end": end}[stage](method, size, folder)
        dist.barrier()
    return results


if __name__ == "__main__":
    stage, output, *names = sys.argv[1:]
    worker.report(output, lambda: staged(stage, output, names))
