"""What every process of a test runs in which one process alone has something else: nobody may be left waiting.

torchrun --nproc_per_node 2 worker_apart.py apart|files|fsdp OUTPUT
"""

import copy
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


sys.path.insert(0, str(Path(__file__).parent))
import models  # noqa: E402
from worker import report, same_everywhere  # noqa: E402

from hf_lowrank import LowRankOptimizer  # noqa: E402


NAME, LATE = "galore_i3s_adamw", "online_subspace_adamw"
UP, NORM = "blocks.0.up.weight", "norm.weight"


def everywhere(action):
    """What was raised on every process, "" for nothing; a process that is out of step fails here."""
    try:
        action()
        text = ""
    except (ValueError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    every = [""] * dist.get_world_size()
    dist.all_gather_object(every, text)
    return every


def other():
    """Whether this is the process that has something else."""
    return dist.get_rank() == 1


def gradients(net, step, change=None):
    """Give a model its gradients, the same on all processes but for what `change` does on one."""
    net.zero_grad()
    models.loss_of(net, step).backward()
    if change is not None and other():
        change(dict(net.named_parameters()))


def nan_in(name):
    def change(parameters):
        getattr(parameters[name].grad, "to_local", lambda: parameters[name].grad)().fill_(float("nan"))

    return change


def without(*names):
    def change(parameters):
        for name in names or parameters:
            parameters[name].grad = None

    return change


def steps(net, opt, *changes):
    """Step once for each change; return what was raised."""

    def run():
        for step, change in enumerate(changes):
            gradients(net, step, change)
            opt.step()

    return everywhere(run)


def other_weights(**shared):
    """A weight that differs in one number, as stages of a pipeline or experts do that are plain tensors."""
    net = models.model()
    if other():
        net.blocks[0].up.weight.data[0, 0] += 1e-3
    return steps(net, models.optimizer(net, NAME, **shared), None)


def other_parameters(**shared):
    """A process that trains fewer parameters, or others."""
    fewer = models.model()
    fewer.embed.requires_grad_(not other())
    wider = models.model(inner=16 if other() else 15)
    return [steps(net, models.optimizer(net, NAME, **shared), None) for net in (fewer, wider)]


def other_options(**shared):
    scale = 0.5 if other() else 0.25
    net = models.model()
    return steps(net, models.optimizer(net, NAME, scale=scale, **shared), None)


def in_step(name, *changes, **shared):
    net = models.model()
    return steps(net, models.optimizer(net, name, **shared), *changes)


def owners_decide():
    """Under sharded state nothing of what a process alone sees matters, if it owns the parameter or not."""
    net = models.model(experts=2)
    opt = models.optimizer(net, NAME, shard_state=True)
    names = [name for name, _ in net.named_parameters()]
    raised = steps(net, opt, *map(nan_in, names), *map(without, names), without(), None)
    skipped = torch.tensor([sum(int(s["skipped"]) for s in opt.state.values())])
    dist.all_reduce(skipped)
    return {"raised": raised, "same": same_everywhere(list(net.parameters())), "skipped": int(skipped),
            "owned": len(opt.state) / len(names)}  # fmt: skip


def sharded(change):
    net = models.model()
    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)
    opt = models.optimizer(net, NAME)
    raised = steps(net, opt, None, change, None)
    counts = [torch.tensor([float(s[key]) for s in opt.state.values()]) for key in ("step", "skipped")]
    return {"raised": raised, "same": same_everywhere(counts), "skipped": float(counts[1].sum())}


def clipped():
    """Clipping by the norm of all projected gradients, of which every process knows some."""
    found = []
    for shared in ({"share_refreshes": True}, {"shard_state": True}):
        net = models.model()
        opt = models.optimizer(net, NAME, max_grad_norm=0.1, **shared)
        steps(net, opt, None, None)
        found.append((opt.projected_grad_norm, [p.detach() for p in net.parameters()]))
    return abs(found[0][0] / found[1][0] - 1), models.displacement(
        found[0][1], found[1][1], [*models.model().parameters()]
    )


def grows():
    """Parameters that are added while training get owners, and those that are there keep theirs."""
    found = []
    for shared in ({"share_refreshes": True}, {"shard_state": True}):
        net = models.model()
        net.lm_head.requires_grad_(False)
        opt = models.optimizer(net, NAME, **shared)
        steps(net, opt, None)
        before = set(opt.state)
        net.lm_head.requires_grad_(True)
        opt.kept()  # asked on all or on one, it decides nothing
        opt.add_param_group({"params": [*net.lm_head.parameters()]})
        steps(net, opt, None, None)
        found.append((before <= set(opt.state), copy.deepcopy([*net.parameters()])))
    equal = all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    return [found[1][0], equal]


def files():
    """What state_dict says before and after it is gathered, and what does not go together."""
    net = models.model()
    opt = models.optimizer(net, NAME, shard_state=True)
    before = everywhere(opt.state_dict)
    steps(net, opt, None)
    apart = everywhere(opt.state_dict)
    opt.consolidate_state_dict(to=0)
    gathered = everywhere(opt.state_dict)
    again = copy.deepcopy(opt)
    steps(net, opt, None)
    plain = models.model()
    unsharded = models.optimizer(plain, NAME)
    unsharded.consolidate_state_dict()
    shards = models.model()
    fully_shard(shards)
    return {
        "before": before,
        "apart": apart,
        "gathered": gathered,
        "stale": everywhere(opt.state_dict),
        "nobody": everywhere(lambda: opt.consolidate_state_dict(to=2)),
        "copied": again.shard_state and [len(s) for s in again.state.values()] == [len(s) for s in opt.state.values()],
        "plain": everywhere(unsharded.state_dict),
        "layerwise": everywhere(lambda: models.optimizer(plain, NAME + "_layerwise", shard_state=True)),
        "FSDP2": everywhere(lambda: models.optimizer(shards, NAME, shard_state=True)),
        "few": few(),
    }


def few():
    """More processes than parameters."""
    p = torch.nn.Parameter(torch.ones(6, 4))
    opt = LowRankOptimizer([{"params": [p], "rank": 2}], NAME, lr=1e-2, shard_state=True)
    for _ in range(2):
        p.grad = torch.arange(24.0).view(6, 4)
        opt.step()
    opt.consolidate_state_dict()
    return [len(opt.state), same_everywhere([p]), everywhere(opt.state_dict)]


def apart():
    shared, owned = {"share_refreshes": True}, {"shard_state": True}
    return {
        "other weights": [other_weights(**shared), other_weights(**owned), other_weights()],
        "other parameters": [*other_parameters(**shared), *other_parameters(**owned)],
        "other options": [other_options(**shared), other_options(**owned)],
        "nan": in_step(NAME, None, nan_in(UP), None, **shared),
        "nan, late": in_step(LATE, None, nan_in(UP), **shared),
        "missing": in_step(NAME, None, without(UP), **shared),
        "missing, dense": in_step(NAME, None, without(NORM), **shared),
        "missing, all": in_step(NAME, without(), **shared),
        "alike": in_step(NAME, None, None, None, None, **shared),
        "owners decide": owners_decide(),
        "clipped": clipped(),
        "grows": grows(),
    }


def fsdp():
    changes = {"missing": without(UP), "missing, all": without(), "nan": nan_in(UP), "alike": None}
    return {case: sharded(change) for case, change in changes.items()}


if __name__ == "__main__":
    report(sys.argv[2], globals()[sys.argv[1]], timeout=timedelta(seconds=60))
