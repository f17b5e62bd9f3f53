"""What every process of a distributed test runs: each check over all methods, its figures written by rank 0.

torchrun --nproc_per_node N worker.py CHECK OUTPUT METHOD...
"""

import copy
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel


sys.path.insert(0, str(Path(__file__).parent))
import models  # noqa: E402

from hf_lowrank import METHODS  # noqa: E402
from hf_lowrank.engine import step as engine  # noqa: E402
from hf_lowrank.methods import resolve  # noqa: E402


STEPS, HALF = 6, 3  # refreshes before steps 1, 3 and 5: the half is in the middle of an interval
SIZES = {"experts": 2}
WHOLE_SPECTRUM = [name for name, row in METHODS.items() if row.subspace in ("hybrid", "uniform")]


def exact(name):
    """Rules that draw from the smallest singular vectors see rounding noise there; a full SVD sees least of it."""
    return {"refresh": "svd"} if name in WHOLE_SPECTRUM else {}


def single(name, *, sizes=SIZES, **options):
    net = models.model(**sizes)
    opt = models.optimizer(net, name, **exact(name), **options)
    models.train(net, opt, STEPS)
    return net, opt


def start(**sizes):
    return [p.detach() for p in models.model(**(sizes or SIZES)).parameters()]


def sharded(**sizes):
    net = models.model(**{"experts": 2, **sizes})
    for block in net.blocks:
        fully_shard(block)
    return fully_shard(net)


def whole(net):
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in net.parameters()]


def same_everywhere(tensors):
    """Whether all processes hold the same bits."""
    flat = torch.cat([torch.zeros(1).double(), *(t.reshape(-1).double() for t in tensors)])
    copies = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, flat)
    return all(torch.equal(copy, flat) for copy in copies)


def ddp(name):
    rank, world = dist.get_rank(), dist.get_world_size()
    alone, reference = single(name)
    net = models.model(experts=2)
    parallel = DistributedDataParallel(net)
    opt = models.optimizer(net, name, share_refreshes=True, **exact(name))
    generator = torch.get_rng_state()
    for step in range(STEPS):
        opt.zero_grad()
        models.loss_of(parallel, step, rank, world).backward()
        opt.step()
    counts = torch.tensor([opt.refreshes_here])
    dist.all_reduce(counts)
    return {
        "displacement": models.displacement(whole(net), whole(alone), start()),
        "same bases": same_everywhere([s["basis"] for s in opt.state.values() if "basis" in s]),
        "same weights": same_everywhere(list(net.parameters())),
        "refreshes": int(counts),
        "refreshes of one process": reference.refreshes_here,
        "most on one": opt.refreshes_here,
        "generator untouched": torch.equal(generator, torch.get_rng_state()),
    }


def fsdp(name):
    rank, world = dist.get_rank(), dist.get_world_size()
    alone, _ = single(name)
    net = sharded()
    opt = models.optimizer(net, name, **exact(name))
    models.train(net, opt, 1, rank, world)
    opt.zero_grad()
    models.loss_of(net, 1, rank, world).backward()
    with CommDebugMode() as counted:
        opt.step()
    collectives = {str(op).split(".")[-1]: n for op, n in counted.get_comm_counts().items()}
    models.train(net, opt, STEPS - 2, rank, world, start=2)
    lazy = sharded()
    layerwise = models.optimizer(lazy, name + "_layerwise", stagger=False, **exact(name))
    models.train(lazy, layerwise, STEPS, rank, world)
    return {
        "displacement": models.displacement(whole(net), whole(alone), start()),
        "layerwise": models.displacement(whole(lazy), whole(alone), start()),
        "collectives": collectives,
        "same bases": same_everywhere(
            [s["basis"] for s in opt.state.values() if "basis" in s and not hasattr(s["basis"], "placements")]
        ),
    }


def tracking(name):
    """A subspace that looks at statistics of its own, those of split stacks among them."""
    alone, _ = single(name, tracking=True)
    net = sharded()
    models.train(net, models.optimizer(net, name, tracking=True), STEPS, dist.get_rank(), dist.get_world_size())
    return models.displacement(whole(net), whole(alone), start())


def rules(name):
    """A rule of all dense parameters, with rates of their own, beside the unsharded run; and resumed."""
    rank, world = dist.get_rank(), dist.get_world_size()
    options = {"dense": name, "embedding_lr": 1e-2, "head_lr": 3e-2, "vector_lr": 5e-3}
    method = "galore_dominant_adamw"
    alone, _ = single(method, **options)
    net = sharded()
    opt = models.optimizer(net, method, **options)
    models.train(net, opt, HALF, rank, world)
    saved, weights = copy.deepcopy(get_optimizer_state_dict(net, opt)), [p.detach().clone() for p in net.parameters()]
    models.train(net, opt, HALF, rank, world, start=HALF)
    again = sharded()
    with torch.no_grad():
        for p, q in zip(again.parameters(), weights, strict=True):
            p.copy_(q)
    other = models.optimizer(again, method, **options)
    set_optimizer_state_dict(again, other, saved)
    models.train(again, other, HALF, rank, world, start=HALF)
    return {
        "displacement": models.displacement(whole(net), whole(alone), start()),
        "resumed": all(torch.equal(a, b) for a, b in zip(whole(net), whole(again), strict=True)),
        "rates": sorted(group["lr"] for group in opt.param_groups),
    }


def mixed(name):
    """One block sharded unevenly, the rest whole on every process; buckets so small that they end anywhere."""
    engine.SYNC_ELEMENTS = 40
    clip = {} if resolve.parts(name, {}).needs_gradient else {"max_grad_norm": 0.1}
    alone, reference = single(name, **clip)
    net = models.model(experts=2)
    fully_shard(net.blocks[0])
    opt = models.optimizer(net, name, **exact(name), **clip)
    models.train(net, opt, STEPS)  # the same batch everywhere: its mean over processes is itself
    found = {"displacement": models.displacement(whole(net), whole(alone), start()), "norm": off(opt, reference)}
    for one, optimizer, holds in ((net, opt, dist.get_rank() == 0), (alone, reference, True)):
        optimizer.zero_grad()
        models.loss_of(one, STEPS).backward()
        gradient = one.blocks[0].up.weight.grad
        if holds:  # the first row
            getattr(gradient, "to_local", lambda gradient=gradient: gradient)()[0, 0] = torch.nan
        optimizer.step()
    return {**found, "norm where one piece is not finite": off(opt, reference)}


def off(opt, reference):
    """How far the norm by which a run clips is from another's."""
    norms = [x.projected_grad_norm or 1.0 for x in (opt, reference)]
    return abs(norms[0] / norms[1] - 1)


def resume(name):
    rank, world = dist.get_rank(), dist.get_world_size()
    net = sharded()
    opt = models.optimizer(net, name)
    models.train(net, opt, HALF, rank, world)
    kinds = {"sharded": StateDictOptions(), "full": StateDictOptions(full_state_dict=True)}
    saved = {kind: copy.deepcopy(get_optimizer_state_dict(net, opt, options=given)) for kind, given in kinds.items()}
    weights = [p.detach().clone() for p in net.parameters()]
    models.train(net, opt, HALF, rank, world, start=HALF)
    found = {}
    for kind, options in kinds.items():
        again = sharded()
        with torch.no_grad():
            for p, q in zip(again.parameters(), weights, strict=True):
                p.copy_(q)
        other = models.optimizer(again, name)
        set_optimizer_state_dict(again, other, saved[kind], options=options)
        models.train(again, other, HALF, rank, world, start=HALF)
        equal = all(torch.equal(a, b) for a, b in zip(whole(net), whole(again), strict=True))
        found[kind] = equal and same_state(opt, other)
    return found


def same_state(a, b):
    for group_a, group_b in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(group_a["params"], group_b["params"], strict=True):
            for key, value in a.state[p].items():
                other = b.state[q][key]
                pair = [getattr(t, "to_local", lambda t=t: t)() for t in (value, other)]
                if value.dtype != other.dtype or not torch.equal(*pair):
                    return False
    return True


def main(checks):
    check, output, *names = sys.argv[1:]
    report(output, lambda: {name: checks[check](name) for name in names})


def report(output, found, **keywords):
    """Begin, write down what is found on process 0, and end."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", **keywords)
    results = found()
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a normal exit


if __name__ == "__main__":
    main(globals())
