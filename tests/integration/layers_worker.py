"""Layer sampling under DistributedDataParallel on several gloo processes.

torchrun --nproc_per_node N layers_worker.py OPTIM OPTIM_ARGS FOLDER
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import Trainer, TrainerCallback


sys.path.insert(0, str(Path(__file__).parent))
from conftest import arguments, tiny_data, tiny_llama  # noqa: E402


class Reduced(TrainerCallback):
    """Notes the bytes of gradients, and those of the buffers that they are reduced in, by a hook of its own."""

    trainer = None

    def __init__(self):
        self.bytes, self.hooked, self.calls = [], [], 0

    def on_train_begin(self, args, state, control, **kwargs):
        def counted(held, bucket):
            self.calls += 1
            return allreduce_hook(held, bucket)

        self.trainer.model_wrapped.register_comm_hook(None, counted)

    def on_step_end(self, args, state, control, **kwargs):
        self.hooked.append(self.calls)

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        buffers = self.trainer.model_wrapped._get_ddp_logging_data()["bucket_sizes"]
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        self.bytes.append([gradients, sum(map(int, buffers.split(",")))])


def main():
    optim, options, folder = sys.argv[1:]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    def train(output, resume=None, **overrides):
        args = arguments(
            Path(folder) / output,
            optim,
            optim_args=options,
            max_steps=6,
            per_device_train_batch_size=4 // int(os.environ["WORLD_SIZE"]),
            max_grad_norm=0.0,
            ddp_find_unused_parameters=False,
            **overrides,
        )
        seen = Reduced()
        seen.trainer = trainer = Trainer(
            tiny_llama(num_hidden_layers=3), args, train_dataset=tiny_data(), callbacks=[seen]
        )
        trainer.train(resume_from_checkpoint=resume)
        return [p.detach() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()], seen

    weights, seen = train("first", save_strategy="steps", save_steps=3)
    again, _ = train("resumed", resume=str(Path(folder) / "first" / "checkpoint-3"))
    alike = []
    for p in weights:
        theirs = p.clone()
        torch.distributed.broadcast(theirs, 0)
        alike.append(torch.equal(p, theirs))
    if int(os.environ["RANK"]) == 1:
        torch.save(weights, Path(folder) / "weights.pt")
        exactly = all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
        report = {"alike": all(alike), "reduced": seen.bytes, "hooked": seen.hooked, "resumed exactly": exactly}
        (Path(folder) / "report.json").write_text(json.dumps(report))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a normal exit


if __name__ == "__main__":
    main()
