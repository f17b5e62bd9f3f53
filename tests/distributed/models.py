"""A model with every kind of matrix, its batches, and one training loop: the same on any number of processes."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from hf_lowrank import METHODS, LowRankOptimizer, param_groups
from hf_lowrank.methods import resolve


sys.path.insert(0, str(Path(__file__).parents[1]))
from fitting import fitting  # noqa: E402


GAP = 2
"""Steps between refreshes."""


class Block(nn.Module):
    """Tall (up), square (mix), wide (down) and narrow (key, as grouped queries have it) matrices; stacked experts."""

    def __init__(self, width, inner, experts):
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width // 2, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.experts = Experts(experts, width) if experts else None

    def forward(self, x):
        y = self.mix(x)
        y = y + self.k_proj(x).repeat(1, 2)
        y = y + self.down_proj(torch.tanh(self.up(y)))
        return y if self.experts is None else y + self.experts(y)


class Experts(nn.Module):
    def __init__(self, count, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width, width + 3) / width**0.5)

    def forward(self, x):
        gates = torch.softmax(x[:, : self.weight.shape[0]], -1)
        return sum(gates[:, i : i + 1] * torch.tanh(x @ self.weight[i])[:, :-3] for i in range(self.weight.shape[0]))


class Model(nn.Module):
    def __init__(self, width=10, inner=15, experts=0):
        super().__init__()
        self.embed = nn.Embedding(29, width)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([Block(width, inner, experts) for _ in range(2)])
        self.lm_head = nn.Linear(width, 23)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        for block in self.blocks:
            x = x + block(x)
        return self.lm_head(x)


def model(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    return Model(**sizes).to(dtype)


def batch(step, rows=96):
    gen = torch.Generator().manual_seed(step)
    return torch.randint(0, 29, (rows,), generator=gen), torch.randint(0, 23, (rows,), generator=gen)


def optimizer(net, name, rank=3, **options):
    shared = {key: options.pop(key, False) for key in ("share_refreshes", "shard_state")}
    return LowRankOptimizer(**keywords(net, name, rank, **options), **shared)


def keywords(net, name, rank=3, **options):
    """What an optimizer of a model takes."""
    fitted = fitting(name, {"rank": rank, "update_proj_gap": GAP, **options})
    groups = param_groups(net, weight_decay=0.1, **fitted)
    row = METHODS[resolve.split(name)[0]]
    # two rules divide by what may be next to nothing; at the common rate such a run is chaos, and equals no other
    lr = 2e-4 if row.moments == "came" or row.subspace == "haar" else 2e-2
    return {"params": groups, "method": name, "lr": lr, "seed": 5}


def loss_of(net, step, rank=0, world=1):
    ids, labels = batch(step)
    piece = slice(rank * len(ids) // world, (rank + 1) * len(ids) // world)
    return F.cross_entropy(net(ids[piece]), labels[piece])


def train(net, opt, steps, rank=0, world=1, start=0):
    for step in range(start, start + steps):
        opt.train()
        opt.zero_grad()
        loss_of(net, step, rank, world).backward()
        opt.step()


def displacement(a, b, start):
    """||a - b|| / ||b - start|| of lists of tensors."""
    difference = sum((x.double() - y.double()).square().sum() for x, y in zip(a, b, strict=True)).sqrt()
    moved = sum((y.double() - z.double()).square().sum() for y, z in zip(b, start, strict=True)).sqrt()
    return (difference / moved).item()
