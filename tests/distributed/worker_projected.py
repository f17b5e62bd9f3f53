"""Replicas that average projected gradients, beside plain DistributedDataParallel.

torchrun --nproc_per_node N worker_projected.py CHECK,CHECK,... OUTPUT NAME ...
"""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel


sys.path.insert(0, str(Path(__file__).parent))
import models  # noqa: E402
from worker import HALF, STEPS, exact, report, same_everywhere, start, whole  # noqa: E402

from hf_lowrank import LowRankOptimizer, exclude_from_ddp, param_groups  # noqa: E402
from hf_lowrank.engine import layerwise  # noqa: E402


def build(name, net=None, dtype=torch.float32, *, exclude=True, **options):
    """A model in DistributedDataParallel, whose low-rank weights are the optimizer's where it reduces them."""
    net = models.model(dtype, experts=2) if net is None else net
    ours = options.get("reduce_projected") or name.endswith("_layerwise")
    opt = models.optimizer(net, name, share_refreshes=not ours, **exact(name), **options)
    if ours and exclude:
        exclude_from_ddp(net, opt)
    return net, DistributedDataParallel(net), opt


def train(parallel, opt, steps, first=0, pieces=1):
    """Steps of `pieces` micro-batches each, of which only the last is reduced by DistributedDataParallel."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, first + steps):
        opt.train()
        opt.zero_grad()
        for i in range(pieces):
            with parallel.no_sync() if i < pieces - 1 else nullcontext():
                (models.loss_of(parallel, step, rank * pieces + i, world * pieces) / pieces).backward()
        opt.step()


def apart(a, b):
    return models.displacement(whole(a), whole(b), start())


def agrees(name):
    """Weights beside those of plain DistributedDataParallel, plain and with accumulation; state; and resumed."""
    found = {}
    for pieces in (1, 3):
        reference, parallel, plain = build(name)
        train(parallel, plain, STEPS, pieces=pieces)
        net, parallel, opt = build(name, reduce_projected=True)
        train(parallel, opt, STEPS, pieces=pieces)
        found[f"displacement {pieces}"] = apart(net, reference)
        found[f"same weights {pieces}"] = same_everywhere(list(net.parameters()))
        found[f"same state {pieces}"] = same_everywhere([x for s in opt.state.values() for x in s.values()])
        lazy, parallel, other = build(f"{name}_layerwise", stagger=False)
        train(parallel, other, STEPS, pieces=pieces)
        found[f"layerwise {pieces}"] = apart(lazy, reference)
        found[f"same layerwise {pieces}"] = same_everywhere(list(lazy.parameters()))
    found["refreshes"] = total(opt.refreshes_here) == total(plain.refreshes_here) > opt.refreshes_here
    half, parallel, a = build(name, reduce_projected=True)
    train(parallel, a, HALF)
    rest, parallel, b = build(name, copy.deepcopy(half), reduce_projected=True)
    b.load_state_dict(a.state_dict())
    train(parallel, b, HALF, first=HALF)
    once, parallel, c = build(name, reduce_projected=True)
    train(parallel, c, STEPS)
    found["resumed"] = all(torch.equal(p, q) for p, q in zip(rest.parameters(), once.parameters(), strict=True))
    return found


def total(number):
    summed = torch.tensor(number)
    dist.all_reduce(summed)
    return int(summed)


class Skipping(models.Model):
    """Block 0 is used by all processes, block 1 by one at a step, and block 2 by none."""

    step = 0

    def __init__(self):
        super().__init__(experts=2)
        self.blocks.append(copy.deepcopy(self.blocks[1]))

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        x = x + self.blocks[0](x)
        if self.step % dist.get_world_size() == dist.get_rank():
            x = x + self.blocks[1](x)
        self.step += 1
        return self.lm_head(x)


def unused(name):
    """Parameters without a gradient on one process, or on all."""
    found, ends = {}, {}
    torch.manual_seed(0)
    begin = Skipping()
    first = [p.detach().clone() for p in begin.parameters()]
    for kind, ending in (("plain", ""), ("reduced", ""), ("layerwise", "_layerwise")):
        net = copy.deepcopy(begin)
        options = {"reduce_projected": True} if kind == "reduced" else {}
        opt = models.optimizer(net, name + ending, share_refreshes=True, stagger=False, **options)
        if kind != "plain":
            exclude_from_ddp(net, opt)
        train(DistributedDataParallel(net, find_unused_parameters=True), opt, STEPS)
        ends[kind] = net
        found[kind] = {
            "displacement": models.displacement(whole(net), whole(ends["plain"]), first),
            "same weights": same_everywhere(list(net.parameters())),
            "steps": [sorted({int(opt.state[p]["step"]) for p in block.parameters()}) for block in net.blocks],
        }
    return found


def bad(name):
    """A gradient that is not finite on one process: all of them skip the step, a refresh being due at it or not."""
    found = {}
    for ending in ("", "_layerwise"):
        options = {} if ending else {"reduce_projected": True}
        net, parallel, opt = build(name + ending, stagger=False, **options)
        train(parallel, opt, 3)
        before = [p.detach().clone() for p in net.parameters()]
        for step in (3, 4):  # a refresh is due at the first, and stays so
            for s in opt.state.values():
                if step == 4 and "refresh_at" in s:
                    s["refresh_at"].fill_(100)
            opt.zero_grad()
            loss = models.loss_of(parallel, step, dist.get_rank(), dist.get_world_size())
            (loss * (float("inf") if dist.get_rank() == 1 else 1.0)).backward()
            opt.step()
        kept = all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        skipped = {int(s["skipped"]) for s in opt.state.values()}
        found[name + ending] = {"kept": total(int(kept)) == dist.get_world_size(), "skipped": sorted(skipped)}
    return found


def clipped(name):
    """Clipping by the norm of what is projected, which all processes know."""
    ends = {}
    for kind, ending in (("plain", ""), ("reduced", ""), ("layerwise", "_layerwise")):
        options = {"reduce_projected": True} if kind == "reduced" else {}
        net, parallel, opt = build(name + ending, max_grad_norm=0.05, stagger=False, **options)
        train(parallel, opt, STEPS, pieces=2)
        ends[kind] = net, opt.projected_grad_norm
    norms = [norm for _, norm in ends.values()]
    return {
        "displacement": max(apart(net, ends["plain"][0]) for net, _ in ends.values()),
        "norms": max(abs(norm / norms[0] - 1) for norm in norms),
        "same norms": same_everywhere([torch.tensor(norms)]),
        "clips": min(norms) > 0.05,
    }


def bf16(name):
    net, parallel, opt = build(name, dtype=torch.bfloat16)
    train(parallel, opt, STEPS)
    ours, parallel, other = build(name, dtype=torch.bfloat16, reduce_projected=True)
    train(parallel, other, STEPS)
    return {"displacement": apart(ours, net), "same weights": same_everywhere(list(ours.parameters()))}


def collectives(name):
    """Those of an ordinary step and of one at which all refreshes are due."""
    net, parallel, opt = build(name, reduce_projected=True, stagger=False)
    counts = []
    for step in range(2):
        opt.zero_grad()
        models.loss_of(parallel, step, dist.get_rank(), dist.get_world_size()).backward()
        with CommDebugMode() as counted:
            opt.step()
        counts.append({str(op).split(".")[-1]: n for op, n in counted.get_comm_counts().items()})
    return {"refresh": counts[0], "ordinary": counts[1]}


class Wide(nn.Module):
    """Six matrices of one size, and a bias."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64, bias=i == 5) for i in range(6)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


def memory(name):
    """The most matrices whose gradients lie at their parameters, in the backward pass and in the step."""
    found = {}
    for kind, ending in (("reduced", ""), ("layerwise", "_layerwise")):
        torch.manual_seed(0)
        net, most = Wide(), {"refresh": 0, "ordinary": 0}
        matrices = [p for p in net.parameters() if p.dim() == 2]
        options = {"reduce_projected": kind == "reduced", "rank": 4, "update_proj_gap": 3, "stagger": False}
        opt = LowRankOptimizer(param_groups(net, **options), name + ending)
        exclude_from_ddp(net, opt)
        now = ["refresh"]

        def look(*_, matrices=matrices, most=most, now=now):
            most[now[0]] = max(most[now[0]], sum(p.grad is not None for p in matrices))

        for p in matrices:
            p.register_post_accumulate_grad_hook(look)  # before ours: it sees the one that has just come
        averaging = layerwise.average_gradients_
        layerwise.average_gradients_ = lambda some, averaging=averaging, look=look: (look(), averaging(some), look())
        parallel = DistributedDataParallel(net)
        for step in range(4):
            now[0] = "refresh" if step % 3 == 0 else "ordinary"
            opt.train()
            opt.zero_grad()
            parallel(torch.randn(4, 64)).backward()
            opt.step()
        layerwise.average_gradients_ = averaging
        found[kind] = most
    return found


def refused(name):
    """What is said where the model or the method does not fit."""
    said = {}

    def saying(what, function):
        try:
            function()
            said[what] = ""
        except ValueError as error:
            said[what] = str(error)

    def step(net, opt):
        opt.train()
        models.loss_of(net, 0).backward()
        opt.step()

    for ending, options in (("", {"reduce_projected": True}), ("_layerwise", {})):
        net, _, opt = build(name + ending, exclude=False, **options)
        saying("not excluded" + ending, lambda net=net, opt=opt: step(net, opt))
    net, parallel, opt = build(name, exclude=False, reduce_projected=True)
    saying("wrapped", lambda: exclude_from_ddp(parallel, opt))
    saying("another model", lambda: exclude_from_ddp(models.model(), opt))
    exclude_from_ddp(net, opt)
    saying("excluded for nothing", lambda: step(net, models.optimizer(net, name)))
    only = nn.Sequential(nn.Linear(8, 8, bias=False))
    one = LowRankOptimizer(param_groups(only, rank=2, reduce_projected=True), name)
    saying("nothing left", lambda: exclude_from_ddp(only, one))
    lazy = models.model()
    saying("in the hook", lambda: models.optimizer(lazy, "fira_adamw_layerwise").train())
    saying("offload", lambda: models.optimizer(lazy, name, layerwise="offload").train())
    sharded = fully_shard(models.model())
    saying("sharded", lambda: step(sharded, models.optimizer(sharded, name, reduce_projected=True)))
    return said


def main():
    checks, output, *names = sys.argv[1:]
    report(output, lambda: {check: {name: globals()[check](name) for name in names} for check in checks.split(",")})


if __name__ == "__main__":
    main()
