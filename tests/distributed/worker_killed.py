"""One of several processes, of which the last is killed in the middle of a step after the checkpoint.

RANK=... WORLD_SIZE=... worker_killed.py FOLDER share_refreshes|shard_state
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


sys.path.insert(0, str(Path(__file__).parent))
import models  # noqa: E402


NAME, SAVED, TIMEOUT = "galore_i3s_adamw", 2, 10


def main():
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, timeout=timedelta(seconds=TIMEOUT), rank=rank, world_size=world)
    net = models.model()
    wrapped, opt = DistributedDataParallel(net), models.optimizer(net, NAME, **{mode: True})
    for step in range(100):
        opt.zero_grad()

        def closure(step=step):
            loss = models.loss_of(wrapped, step)
            loss.backward()
            if step == SAVED + 1 and rank == world - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss

        opt.step(closure)
        if step + 1 == SAVED:
            opt.consolidate_state_dict()
            if rank == 0:
                torch.save({"optimizer": opt.state_dict(), "weights": net.state_dict()}, folder / "checkpoint.pt")


if __name__ == "__main__":
    main()
