"""What each process holds and sends: torchrun --nproc_per_node N worker_planner.py OUTPUT STRATEGIES NAME..."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import LowRankOptimizer, param_groups
from hf_lowrank.observe import counting


GAP = 4
PLAN = {
    "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
    **{f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    **{f"model.layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
    "lm_head": ColwiseParallel(output_layouts=Replicate()),
}
"""What LLaMA's own plan says, in torch's words."""
ROUND = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}  # times a buffer goes round
PASSED_ON = {"broadcast_", "gather_"}


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 120, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=200, tie_word_embeddings=False)
    return LlamaForCausalLM(config)


class Sent(TorchDispatchMode):
    """Bytes that go round a ring from this process: of every collective's whole buffer, but for its own piece."""

    def __init__(self):
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket._qualified_op_name.removeprefix("c10d::")
        if op.namespace == "c10d" and name in {*ROUND, *PASSED_ON}:
            w = next(dist.ProcessGroup.unbox(x).size() for x in args if isinstance(x, torch.ScriptObject))
            lists = [x if isinstance(x, (list, tuple)) else [x] for x in args[:2]]
            sizes = [x.nbytes for some in lists for x in some if isinstance(x, torch.Tensor)]
            self.bytes += ROUND[name] * (w - 1) / w * max(sizes) if name in ROUND else sizes[-1]
        return op(*args, **(kwargs or {}))


def measured(name, strategy, *options):
    net = llama()
    if strategy in ("fsdp2", "hsdp"):
        world = dist.get_world_size()
        shape = (world,) if strategy == "fsdp2" else (2, world // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape) :])
        for layer in net.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(net, mesh=mesh)
    elif strategy == "tp":
        net = parallelize_module(net, init_device_mesh("cpu", (dist.get_world_size(),)), PLAN)
    run = DistributedDataParallel(net) if strategy.startswith("ddp") else net
    groups = param_groups(net, method=name, rank=8, update_proj_gap=GAP, **dict.fromkeys(options, True))
    opt = LowRankOptimizer(groups, name, share_refreshes=strategy == "ddp", shard_state=strategy == "ddp_sharded")
    ids = torch.arange(64).view(2, 32)
    sent = []
    for _ in range(2):
        opt.zero_grad()
        with Sent() as passes:
            run(input_ids=ids, labels=ids).loss.backward()
        with Sent() as step:
            opt.step()
        sent.append((passes.bytes, step.bytes))
    state = sum(getattr(x, "to_local", lambda x=x: x)().nbytes for p in opt.state for x in opt.state[p].values())
    return {
        "state": most(state),
        "weights": most(counting.weight_bytes(net.parameters())),
        "passes": sent[1][0],
        "step": sent[1][1],
        "refresh": (sent[0][1] - sent[1][1]) / GAP,
    }


def most(number):
    numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(numbers, torch.tensor([number]))
    return int(max(numbers))


def main():
    output, strategies, *names = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: {s: measured(name, *s.split()) for s in strategies.split(",")} for name in names}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort a normal exit


if __name__ == "__main__":
    main()
