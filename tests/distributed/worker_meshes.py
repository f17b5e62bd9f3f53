"""What every process of a test of meshes runs: each check over all methods, its figures written by rank 0.

torchrun --nproc_per_node N worker_meshes.py CHECK OUTPUT METHOD...
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard


sys.path.insert(0, str(Path(__file__).parent))
import models  # noqa: E402
from worker import STEPS, exact, main, same_everywhere, single, start  # noqa: E402

from hf_lowrank.observe.update_rank import UpdateRank  # noqa: E402


OVER_BOTH = {0: [_StridedShard(0, split_factor=2), Shard(0)], 1: [Shard(0), Shard(1)]}
"""Where FSDP2 over the first dimension of a mesh leaves what tensor parallel has split on an axis, over the second."""
CUTS = {
    "hsdp": (lambda axis: [Replicate(), Shard(0)], lambda axis: [(1, 0)]),
    "tensor": (lambda axis: [Replicate(), Shard(axis)], lambda axis: [(1, axis)]),
    "both": (OVER_BOTH.get, lambda axis: [(1, axis), (0, 0)]),
    "turned": (lambda axis: [Shard(1 - axis), Shard(axis)], lambda axis: [(1, axis), (0, 1 - axis)]),
}
"""By kind of mesh, for a weight that tensor parallel splits on `axis`: its placements, and the cuts (mesh dimension,
axis) in the order in which they are made."""

SIZES = {"experts": 4}
OPTIONS = {
    "galore_dominant_muon": {"orthogonalize": "polar_express"},  # in fp32, on the whole of R, whose columns lie apart
    "galore_dominant_adamw": {"max_grad_norm": 0.1},  # of which copies count once
}


def axis_of(name):
    """Which axis of a weight tensor parallel splits: the inputs of what comes second, else the outputs."""
    return 1 if "down_proj" in name or "k_proj" in name else 0


class Placed:
    """The model with every parameter placed by hand: any placement, any length, the gradients those of one process."""

    def __init__(self, kind, mesh, dtype=torch.float32):
        self.kind, self.mesh = kind, mesh
        self.plain, self.net = models.model(dtype, **SIZES), models.model(dtype, **SIZES)
        self.names = [name for name, _ in self.net.named_parameters()]
        with torch.no_grad():
            for name, p in list(self.net.named_parameters()):
                module = self.net.get_submodule(name.rpartition(".")[0])
                setattr(module, name.rpartition(".")[2], nn.Parameter(self.place(name, p)))

    def place(self, name, whole):
        """Return this process's piece of a tensor."""
        if whole.dim() == 1 and self.kind in ("tensor", "turned"):
            return DTensor.from_local(whole.clone(), self.mesh, [Replicate()] * 2, run_check=False)
        kind = "both" if self.kind == "turned" and "blocks" not in name else self.kind  # rules of rows need them whole
        placements, cuts = (one(axis_of(name) if whole.dim() > 1 else 0) for one in CUTS[kind])
        if whole.dim() == 3 and self.kind == "turned":  # experts over one dimension, their rows over the other
            placements, cuts = [Shard(1), Shard(0)], [(0, 1), (1, 0)]
        piece, own = whole.detach(), self.mesh.get_coordinate()
        for dim, axis in cuts:
            width = -(-piece.shape[axis] // self.mesh.size(dim))
            first = min(own[dim] * width, piece.shape[axis])
            piece = piece.narrow(axis, first, min(width, piece.shape[axis] - first))
        return DTensor.from_local(
            piece.clone(), self.mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def whole(self):
        """Return all parameters as wholes, put together from the pieces by their places alone."""
        found = []
        for name, p, q in zip(self.names, self.net.parameters(), self.plain.parameters(), strict=True):
            places = self.place(name, torch.arange(q.numel()).view(q.shape)).to_local().reshape(-1)
            total = torch.zeros(2, q.numel(), dtype=torch.float64)
            total[0, places] = p.detach().to_local().reshape(-1).double()
            total[1, places] = 1.0
            dist.all_reduce(total)
            found.append((total[0] / total[1]).view(q.shape))
        return found

    def train(self, opt, steps, begin=0):
        for step in range(begin, begin + steps):
            with torch.no_grad():
                for p, whole in zip(self.plain.parameters(), self.whole(), strict=True):
                    p.copy_(whole)
            self.plain.zero_grad()
            models.loss_of(self.plain, step).backward()
            for name, p, q in zip(self.names, self.net.parameters(), self.plain.parameters(), strict=True):
                p.grad = self.place(name, q.grad)
            opt.step()


def matrices(net):
    """What metrics look at, but for stacks, of which a process sees its own."""
    return [(name, p) for name, p in net.named_parameters() if p.dim() == 2 and "blocks" in name]


def placed(case):
    """A run beside that of one process, and who has refreshed."""
    kind, name = case.split(":")
    world = dist.get_world_size()
    shape = (2, world // 2) if kind == "hsdp" else (world // 2, 2)
    alone, reference = single(name, sizes=SIZES, **OPTIONS.get(name, {}))
    placed = Placed(kind, init_device_mesh("cpu", shape, mesh_dim_names=("data", "model")))
    opt = models.optimizer(placed.net, name, **exact(name), **OPTIONS.get(name, {}))
    measured = [UpdateRank(exact=how) for how in (False, True) for _ in range(2)]
    for one, net in zip(measured, (placed.net, models.model(**SIZES)) * 2, strict=True):
        one.measure(matrices(net))
    placed.train(opt, STEPS)
    ranks = [one.measure(matrices(net)) for one, net in zip(measured, (placed.net, alone) * 2, strict=True)]
    counts = torch.tensor([opt.refreshes_here])
    dist.all_reduce(counts)
    bases = [s["basis"] for s in opt.state.values() if "basis" in s and not hasattr(s["basis"], "placements")]
    return {
        "displacement": models.displacement(placed.whole(), list(alone.parameters()), start(**SIZES)),
        "same bases": same_everywhere(bases),
        "ranks": [max(abs(here[key] / there[key] - 1) for key in there) for here, there in (ranks[:2], ranks[2:])],
        "refreshes": int(counts),
        "refreshes of one process": reference.refreshes_here,
        "most on one": opt.refreshes_here,
        "norm": abs((opt.projected_grad_norm or 1.0) / (reference.projected_grad_norm or 1.0) - 1),
    }


def copies(name):
    """Whether the copies of weights in bf16, whose roundings are drawn, stay the same."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "model"))
    placed = Placed("hsdp", mesh, torch.bfloat16)
    placed.train(models.optimizer(placed.net, name, stochastic_rounding=True), 3)
    pieces = [p.detach().to_local().float().reshape(-1) for p in placed.net.parameters()]
    flat = torch.cat(pieces)
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat, group=mesh.get_group("data"))
    return torch.equal(*both)


if __name__ == "__main__":
    main(globals())
