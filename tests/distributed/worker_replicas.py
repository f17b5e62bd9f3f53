"""What every process of a test of replicas runs: sharded state, its checkpoints, and torch's ZeroRedundancyOptimizer.

torchrun --nproc_per_node N worker_replicas.py CHECK OUTPUT METHOD...
"""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel


sys.path.insert(0, str(Path(__file__).parent))
import models  # noqa: E402
from worker import HALF, STEPS, main, same_everywhere, same_state  # noqa: E402

from hf_lowrank import LowRankOptimizer  # noqa: E402
from hf_lowrank.engine import ownership  # noqa: E402
from hf_lowrank.state import view  # noqa: E402


ASLEEP = "blocks.1.up.weight"  # a matrix that is not trained: its owner has counters alone


def built(name, **options):
    net = models.model(experts=2)
    opt = models.optimizer(net, name, **options)
    net.get_parameter(ASLEEP).requires_grad_(False)
    return net, opt


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def parallel(name, **options):
    """Train under DistributedDataParallel, every process on its piece of the batch."""
    net, opt = built(name, **options)
    wrapped = DistributedDataParallel(net)
    for step in range(STEPS):
        opt.zero_grad()
        models.loss_of(wrapped, step, dist.get_rank(), dist.get_world_size()).backward()
        opt.step()
    return net, opt


def shard(name):
    """Sharded state beside plain DDP, in small buckets, with refreshes spread over the interval as on a GPU."""
    ownership.BUCKET_BYTES = 300  # bytes: some weights are larger, some travel together
    rank = dist.get_rank()
    plain, whole = parallel(name, share_refreshes=True, stagger=True)
    net, opt = parallel(name, shard_state=True, stagger=True)
    held = [sum(view.nbytes(s) for s in opt.state.values()), opt.declared_bytes(), whole.declared_bytes()]
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, held)
    counts = torch.tensor([float(bool(opt.state.get(p))) for p in net.parameters()])
    dist.all_reduce(counts)
    opt.consolidate_state_dict(to=1)
    if rank == 1:
        found, wanted = opt.state_dict(), whole.state_dict()
        same_file = found["param_groups"] == wanted["param_groups"] and list(found["state"]) == list(wanted["state"])
        for i, state in wanted["state"].items():
            same_file &= list(state) == list(found["state"][i])
            same_file &= all(torch.equal(t, found["state"][i][key]) for key, t in state.items())
            same_file &= all(t.stride() == found["state"][i][key].stride() for key, t in state.items())
    same = [same_file if rank == 1 else None]
    dist.broadcast_object_list(same, src=1)
    return {
        "equal to plain": equal(net.parameters(), plain.parameters()),
        "same weights": same_everywhere(list(net.parameters())),
        "one owner each": bool((counts == 1).all()),
        "bytes": [one[0] for one in every],
        "declared": [one[1] for one in every],
        "whole": held[2],
        "same file": same[0],
    }


def resume(name):
    """From sharded state to all others and back: every process sees the whole batch, so all must be equal in bits."""
    alone, single = built(name)
    models.train(alone, single, HALF)
    middle, weights = copy.deepcopy(single.state_dict()), copy.deepcopy(alone.state_dict())
    models.train(alone, single, HALF, start=HALF)
    net, opt = built(name, shard_state=True)
    models.train(net, opt, HALF)
    with torch.device("meta"):  # where torch makes its tensors by default
        opt.consolidate_state_dict()
    file = Path(sys.argv[2]).with_suffix(f".{name}.pt")
    if dist.get_rank() == 0:
        torch.save({"optimizer": opt.state_dict(), "weights": net.state_dict()}, file)
    dist.barrier()
    models.train(net, opt, HALF, start=HALF)
    found = {"uninterrupted": equal(net.parameters(), alone.parameters())}
    saved = torch.load(file, weights_only=True)
    for kind, options in {
        "one process": {},
        "plain DDP": {"share_refreshes": True},
        "sharded": {"shard_state": True},
    }.items():
        found[kind] = goes_on(name, saved["optimizer"], saved["weights"], alone, **options)
    found["back"] = goes_on(name, middle, weights, alone, shard_state=True)
    return found


def elsewhere(name):
    """What other processes have saved, on as many as there are here."""
    alone, single = built(name)
    models.train(alone, single, STEPS)
    saved = torch.load(Path(sys.argv[2]).parent / f"resume-2.{name}.pt", weights_only=True)
    return {
        kind: goes_on(name, saved["optimizer"], saved["weights"], alone, **{kind: True})
        for kind in ("shard_state", "share_refreshes")
    }


def goes_on(name, state, weights, wanted, **options):
    net, opt = built(name, **options)
    net.load_state_dict(weights)
    opt.load_state_dict(copy.deepcopy(state))
    held = sum(view.nbytes(s) for s in opt.state.values())  # of what is loaded each process takes what it owns
    models.train(net, opt, HALF, start=HALF)
    equals = equal(net.parameters(), wanted.parameters()) and same_everywhere(list(net.parameters()))
    return equals and held == opt.declared_bytes()


def zero(name):
    """torch's ZeroRedundancyOptimizer around ours, with and without its buckets, beside one process."""
    alone, single = built(name)
    train(alone, single)
    found = {}
    for buckets in (False, True):
        net = models.model(experts=2)
        own = models.keywords(net, name)
        groups = own.pop("params")
        opt = ZeroRedundancyOptimizer(groups, LowRankOptimizer, parameters_as_bucket_view=buckets, **own)
        net.get_parameter(ASLEEP).requires_grad_(False)
        train(net, opt)
        opt.consolidate_state_dict()
        found[f"buckets {buckets}"] = equal(net.parameters(), alone.parameters())
        if dist.get_rank() == 0:
            again, other = built(name)
            other.load_state_dict(opt.state_dict())
            found["same state"] = same_state(other, single)
    every = [0] * dist.get_world_size()
    dist.all_gather_object(every, len(opt.optim.state))
    return {**found, "shared out": every}


def train(net, opt):
    for step in range(STEPS):
        opt.zero_grad()
        models.loss_of(net, step).backward()
        opt.step()


if __name__ == "__main__":
    main(globals())
