"""torchtitan's Llama under FSDP2 on the CPU: `torchrun torchtitan_worker.py FOLDER` trains, saves and resumes."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpointer.base import ModelWrapper
from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry

from hf_lowrank.hf.torchtitan import LowRankContainer


STEPS, SAVED = 6, 4  # the checkpoint lies between two refreshes
SETTINGS = {"lr": 1e-2, "options": {"rank": 16, "update_proj_gap": 3}}


def llama(layers=1):
    """Its debug model, with attention that has a backward on the CPU."""
    torch.manual_seed(0)
    config = model_registry("debugmodel", attn_backend="flex").model
    config.layers = config.layers[:layers]
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    model.init_weights(buffer_device=torch.device("cpu"))
    return model


def built(model, **changes):
    """The container and its schedule, as torchtitan's Trainer builds them."""
    container = LowRankContainer.Config(**{**SETTINGS, **changes}).build(model_parts=[model])
    schedule = LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=container, training_steps=STEPS)
    return container, schedule


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 2048, (4, 17), generator=generator)


def train(model, container, schedule, steps, rank=0, processes=1):
    for step in steps:
        tokens = batch(step)[rank::processes]
        container.zero_grad()
        logits = model(tokens[:, :-1], torch.arange(16).expand(len(tokens), 16))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        container.step()
        schedule.step()


def saved(model, container, schedule):
    """What torchtitan's checkpoint manager hands to torch.distributed.checkpoint."""
    return {"model": ModelWrapper(model), "optimizer": container, "lr_scheduler": schedule}


def whole(model):
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def sharded():
    model = llama()
    for layer in model.layers.values():
        fully_shard(layer)
    return fully_shard(model)


def main(folder):
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = sharded()
    container, schedule = built(model)
    train(model, container, schedule, range(SAVED), rank, processes)
    dcp.save(saved(model, container, schedule), checkpoint_id=folder / "checkpoint")
    train(model, container, schedule, range(SAVED, STEPS), rank, processes)
    again = sharded()
    container, schedule = built(again)
    dcp.load(saved(again, container, schedule), checkpoint_id=folder / "checkpoint")
    train(again, container, schedule, range(SAVED, STEPS), rank, processes)
    result = {"trained": whole(model), "resumed": whole(again)}
    if rank == 0:
        torch.save(result, folder / "result.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
