"""Trains a tiny LLaMA, saving at every step; continues from the last complete checkpoint if there is one.

python kill_worker.py OPTIM FOLDER
"""

import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent))
from conftest import arguments, train  # noqa: E402

from hf_lowrank.methods.resolve import split  # noqa: E402


def main():
    optim, folder = sys.argv[1], Path(sys.argv[2])
    layerwise = split(optim)[1].get("layerwise", False)
    args = arguments(
        folder,
        optim,
        max_steps=12,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=3,
        max_grad_norm=0.0 if layerwise else 1.0,
    )
    resume = any(folder.glob("checkpoint-*")) or None
    trainer = train(args, resume=resume)
    history = [
        {k: v for k, v in row.items() if "refresh_ms" not in k} for row in trainer.state.log_history if "loss" in row
    ]
    torch.save({"weights": list(trainer.model.state_dict().values()), "history": history}, folder / "final.pt")


if __name__ == "__main__":
    main()
