"""Trainer on several gloo processes, clipping and accumulating: what averages projected gradients, and what offloads.

torchrun --nproc_per_node N projected_worker.py ddp|SHARDED_STATE_DICT FOLDER
"""

import os
import sys
import warnings
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer


sys.path.insert(0, str(Path(__file__).parent))
from conftest import arguments, engine, tiny_data, tiny_llama  # noqa: E402
from parallel_worker import OPTIONS, STEPS, FSDP2Trainer, whole  # noqa: E402

from hf_lowrank import LowRankTrainer  # noqa: E402


RUNS = {
    "ddp": {
        "reduced": (Trainer, "galore_dominant_adamw", ",reduce_projected=true"),
        "layerwise": (Trainer, "galore_dominant_adamw_layerwise", ""),
        "own trainer": (LowRankTrainer, "galore_dominant_adamw", ",reduce_projected=true"),
    },
    "SHARDED_STATE_DICT": {"offload": (FSDP2Trainer, "fira_adamw_layerwise", "")},
}
"""By kind of parallelism: what is run, of which Trainer, optimizer and further options."""

CLIP = 0.1


def main():
    kind, folder = sys.argv[1:]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = {}
    for name, (trainer_class, optim, more) in RUNS[kind].items():
        args = arguments(
            Path(folder) / name,
            optim,
            optim_args=OPTIONS + more,
            max_steps=STEPS,
            per_device_train_batch_size=2 // int(os.environ["WORLD_SIZE"]),
            gradient_accumulation_steps=2,
            max_grad_norm=CLIP,
        )
        trainer = trainer_class(tiny_llama(), args, train_dataset=tiny_data())
        trainer.train()
        wrapped, opt = trainer.model_wrapped, engine(trainer)
        matrices = {p for group in opt.param_groups if "rank" in group for p in group["params"]}
        theirs = wrapped._module_parameters if isinstance(wrapped, DistributedDataParallel) else []
        found[name] = {
            "weights": whole(trainer.accelerator.unwrap_model(trainer.model)),
            "left to us": not matrices & set(theirs),
            "logged": [row for row in trainer.state.log_history if "loss" in row],
            "layerwise": opt.param_groups[0]["layerwise"],
        }
    if int(os.environ["RANK"]) == 0:
        torch.save(found, Path(folder) / "found.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a normal exit


if __name__ == "__main__":
    main()
