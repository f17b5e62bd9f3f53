"""Pieces of bases (`shard_basis`) beside whole ones: torchrun --nproc_per_node N worker_bases.py OUTPUT NAME..."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor


sys.path.insert(0, str(Path(__file__).parent))
import models  # noqa: E402
from worker import HALF, STEPS, exact, main, same_state, sharded, whole  # noqa: E402

from hf_lowrank.methods import resolve  # noqa: E402
from hf_lowrank.state import view  # noqa: E402


def trained(name, steps=STEPS, **options):
    net = sharded()
    opt = models.optimizer(net, name, **exact(name), **options)
    models.train(net, opt, steps, dist.get_rank(), dist.get_world_size())
    return net, opt


def on(name):
    """The option, where the method has it: where it keeps a basis."""
    return {"shard_basis": True} if "shard_basis" in resolve.Config.of(name, {}, model=True).options else {}


def pieces(name):
    """Weights and moments, bit for bit; the pieces put together; bytes; and a resumed run."""
    rank, world = dist.get_rank(), dist.get_world_size()
    options = {"basis_format": "fp32"} if name == "q_galore_adamw" else {}
    net, opt = trained(name, **options)
    other, shared = trained(name, **on(name), **options)
    found = {
        "weights": all(torch.equal(a, b) for a, b in zip(whole(net), whole(other), strict=True)),
        "state": all(
            torch.equal(full(a), full(b))
            for p, q in zip(net.parameters(), other.parameters(), strict=True)
            for a, b in zip(opt.state[p].values(), shared.state[q].values(), strict=True)
        ),
        "bytes": [sum(view.nbytes(s) for s in o.state.values()) for o in (opt, shared)],
        "declared": [o.declared_bytes() for o in (opt, shared)],
    }
    lazy, freed = sharded(), None
    freed = models.optimizer(lazy, name + "_layerwise", stagger=False, **on(name), **exact(name), **options)
    models.train(lazy, freed, STEPS, rank, world)
    found["layerwise"] = models.displacement(whole(lazy), whole(net), [p.detach() for p in fresh().parameters()])
    for kind, how in {"sharded": StateDictOptions(), "full": StateDictOptions(full_state_dict=True)}.items():
        net, opt = trained(name, HALF, **on(name), **options)
        saved = copy.deepcopy(get_optimizer_state_dict(net, opt, options=how))
        again = sharded()
        with torch.no_grad():
            for p, q in zip(again.parameters(), net.parameters(), strict=True):
                p.copy_(q)
        resumed = models.optimizer(again, name, **on(name), **exact(name), **options)
        set_optimizer_state_dict(again, resumed, saved, options=how)
        for run, optimizer in ((net, opt), (again, resumed)):
            models.train(run, optimizer, HALF, rank, world, start=HALF)
        found[kind] = all(torch.equal(a, b) for a, b in zip(whole(net), whole(again), strict=True)) and same_state(
            opt, resumed
        )
    return found


def fresh():
    return models.model(experts=2)


def full(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


if __name__ == "__main__":
    main({"pieces": pieces})
