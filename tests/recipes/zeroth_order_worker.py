"""MeZO on several gloo processes: what travels in a step, and the weights at the end.

torchrun --nproc_per_node N zeroth_order_worker.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
from tiny_llama import Rows, tiny  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

from recipes.shared.zeroth_order import ZerothOrderTrainer, full  # noqa: E402


class Traffic(TorchDispatchMode):
    """Records what goes between processes: (operation, numbers)."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            numbers = sum(x.numel() for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            self.sent.append((func.name(), numbers))
        return func(*args, **(kwargs or {}))


class Counted(ZerothOrderTrainer):
    steps = []

    def training_step(self, *args, **kwargs):
        with Traffic() as traffic:
            loss = super().training_step(*args, **kwargs)
        self.steps.append(traffic.sent)
        return loss


def main(folder):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=4 // processes, learning_rate=1e-3, save_strategy="no",
        use_cpu=True, report_to="none", disable_tqdm=True, max_grad_norm=0.0, weight_decay=0.1,
    )  # fmt: skip
    trainer = Counted(tiny(), args, draw=full, eps=1e-3, in_place=False, train_dataset=Rows())
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    torch.save((weights, trainer.steps), Path(folder) / f"{processes}-{os.environ.get('RANK', 0)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
