"""Models that torch and transformers have split by their own plans, beside one process with the same global batch.

torchrun --nproc_per_node N worker_plans.py CHECK OUTPUT CASE...
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module


sys.path.insert(0, str(Path(__file__).parent))
import models  # noqa: E402
from worker import STEPS, main, whole  # noqa: E402


SIZES = {"width": 8, "inner": 16}
PLAN = {
    "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
    "norm": SequenceParallel(sequence_dim=0),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
    "blocks.*.mix": ColwiseParallel(output_layouts=Replicate()),
    "blocks.*.k_proj": ColwiseParallel(output_layouts=Replicate()),
    "blocks.*.up": ColwiseParallel(),
    "blocks.*.down_proj": RowwiseParallel(),
}
"""Outputs, inputs, tokens; biases along with them or copied; the norm sees half of the tokens."""


class Normed(models.Model):
    """The model with its norm over tokens that are split."""

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        x = x.full_tensor() if isinstance(x, DTensor) else x
        for block in self.blocks:
            x = x + block(x)
        return self.lm_head(x)


def _normed():
    torch.manual_seed(0)
    return Normed(**SIZES)


def _run(net, name, loss_of):
    name, _, layerwise = name.partition("+")
    opt = models.optimizer(net, name, **({"layerwise": layerwise, "stagger": False} if layerwise else {}))
    for step in range(STEPS):
        opt.train()
        opt.zero_grad()
        loss_of(net, step).backward()
        opt.step()
    return opt


def _figures(net, alone, before):
    found = {tuple(str(one) for one in p.placements) if isinstance(p, DTensor) else () for p in net.parameters()}
    return {
        "displacement": models.displacement(whole(net), [p.detach() for p in alone.parameters()], before),
        "placements": sorted("/".join(one) for one in found),
    }


def torch_plan(case):
    """parallelize_module over one dimension, and over the second of two with FSDP2 over the first."""
    data, name = case.split(":")
    replicas = dist.get_world_size() // 2 if data == "fsdp" else 1
    alone = _normed()
    before = [p.detach().clone() for p in alone.parameters()]
    _run(alone, name.partition("+")[0], models.loss_of)
    shape, names = ((replicas, 2), ("data", "model")) if data == "fsdp" else ((dist.get_world_size(),), ("model",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    net = parallelize_module(_normed(), mesh["model"], PLAN)
    if data == "fsdp":
        for block in net.blocks:
            fully_shard(block, mesh=mesh["data"])
        fully_shard(net, mesh=mesh["data"])
    place = mesh.get_local_rank("data") if data == "fsdp" else 0
    _run(net, name, lambda net, step: models.loss_of(net, step, place, replicas))
    return _figures(net, alone, before)


def _saved(kind, folder):
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 24, "num_key_value_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    if kind == "llama":
        net = LlamaForCausalLM(LlamaConfig(**sizes))
    else:
        net = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))
    if dist.get_rank() == 0:
        net.save_pretrained(folder)
    dist.barrier()
    return net


def _causal(net, step, place=0, parts=1):
    gen = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 32, (8, 12), generator=gen)
    piece = ids[place * 8 // parts : (place + 1) * 8 // parts]
    return net(input_ids=piece, labels=piece).loss


def transformers_plan(case):
    """from_pretrained with a DistributedConfig: "llama:tp_size=2,fsdp_size=2:fira_adamw"."""
    from transformers.distributed import DistributedConfig

    kind, sizes, name = case.split(":")
    sizes = {key: int(value) for key, value in (one.split("=") for one in sizes.split(","))}
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    alone = _saved(kind, folder[0])
    before = [p.detach().clone() for p in alone.parameters()]
    _run(alone.train(), name, _causal)
    net = type(alone).from_pretrained(folder[0], distributed_config=DistributedConfig(**sizes)).train()
    batches = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1)
    place = dist.get_rank() // (dist.get_world_size() // batches)
    _run(net, name, lambda net, step: _causal(net, step, place, batches))
    return _figures(net, alone, before)


if __name__ == "__main__":
    main(globals())
