"""Trains a tiny LLaMA; in its third step it says so with a file, and waits for a file `go` beside the folder.

python folder_worker.py registered|LowRankTrainer|by-hand FOLDER [WAIT]
"""

import sys
import time
from pathlib import Path

from transformers import Trainer, TrainerCallback


sys.path.insert(0, str(Path(__file__).parent))
from conftest import arguments, tiny_data, tiny_llama  # noqa: E402

import hf_lowrank  # noqa: E402


class Waiting(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir)
        if state.global_step == 2:
            (folder / f"waiting-{args.process_index}").touch()
            while not folder.with_name("go").exists():
                time.sleep(0.01)


def main():
    way, folder, *wait = sys.argv[1:]
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    # a worker process of the data loader is forked while the folder is held
    args = arguments(Path(folder), "galore_i3s_adamw", dataloader_num_workers=1, **saving)
    common = {"args": args, "train_dataset": tiny_data(), "callbacks": [Waiting()] if wait else []}
    model = tiny_llama()
    if way == "by-hand":
        hf_lowrank.unregister()
        built = hf_lowrank.optimizer_cls_and_kwargs(model, "galore_i3s_adamw", args=args, rank=4)
        common["callbacks"].append(hf_lowrank.LowRankCallback())
        trainer = Trainer(model, optimizer_cls_and_kwargs=built, **common)
    else:
        trainer = (hf_lowrank.LowRankTrainer if way == "LowRankTrainer" else Trainer)(model, **common)
    trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")))


if __name__ == "__main__":
    main()
