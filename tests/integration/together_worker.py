"""Trainings on two processes: with other settings on one of them, by a pair, and with one killed while saving.

torchrun --nproc_per_node 2 together_worker.py settings|pairs|killed OUTPUT FOLDER
"""

import shutil
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Trainer


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "distributed")]
from conftest import arguments, tiny_llama, train  # noqa: E402
from worker import report, same_everywhere  # noqa: E402
from worker_apart import everywhere, other  # noqa: E402

import hf_lowrank  # noqa: E402
from hf_lowrank.hf.checkpoints import lacks_generators  # noqa: E402


NAME = "galore_i3s_adamw"
FOLDER = Path(sys.argv[3])


def settings():
    """What every process is told where the second was started with another value."""

    def told(**pairs):
        here = {key: pair[other()] for key, pair in pairs.items()}
        args = arguments(FOLDER / "-".join(pairs), **{"optim": NAME, "max_steps": 1, **here})
        return everywhere(lambda: train(args))

    def options(*pair):
        return {"optim_args": [f"rank=4,{text}" for text in pair]}

    return {
        "optim": told(optim=(NAME, "fira_adamw")),
        "layerwise": told(optim=(NAME, f"{NAME}_layerwise")),
        "scale": told(**options("scale=0.25", "scale=0.5")),
        "update_proj_gap": told(**options("update_proj_gap=1", "update_proj_gap=2")),
        "reduce_projected": told(**options("reduce_projected=false", "reduce_projected=true")),
        "shard_state": told(**options("shard_state=false", "shard_state=true")),
        "lr": told(learning_rate=(1e-2, 2e-2), warmup_steps=(1, 1)),  # the first rate of both is 0
        "weight_decay": told(weight_decay=(0.0, 0.1)),
        "seed": told(seed=(1, 2), data_seed=(1, 1)),
        "the same": told(weight_decay=(0.1, 0.1)),
    }


def by_pair(folder, name, **options):
    args, model = arguments(folder, "adamw_torch"), tiny_llama()
    pair = hf_lowrank.optimizer_cls_and_kwargs(model, name, args=args, rank=4, update_proj_gap=3, **options)
    return train(args, model, optimizer_cls_and_kwargs=pair, callbacks=[hf_lowrank.LowRankCallback()])


def pairs():
    """Whether a pair trains what the flag does, registered or not, and what it says where it cannot."""
    found = {}
    for name, options in (
        (f"{NAME}_layerwise", {}),
        (NAME, {"reduce_projected": True}),
        (NAME, {"shard_state": True}),
    ):
        folder = FOLDER / "-".join([name, *options])
        texts = ["rank=4", "update_proj_gap=3", *(f"{key}=true" for key in options)]
        weights = [[*train(arguments(folder / "flag", name, optim_args=",".join(texts))).model.parameters()]]
        weights += [[*by_pair(folder / "pair", name, **options).model.parameters()]]
        hf_lowrank.unregister()
        raised = everywhere(
            lambda: weights.append([*by_pair(folder / "alone", name, **options).model.parameters()])  # noqa: B023
        )
        hf_lowrank.register()
        equal = [all(torch.equal(a, b) for a, b in zip(weights[0], some, strict=True)) for some in weights]
        found[folder.name] = {"equal": equal, "raised": raised, "same": same_everywhere(weights[1])}
    return found


class Killed(Trainer):
    """The second process has not written its random generator's state at step 4, as if it had been killed there."""

    def _save_rng_state(self, output_dir):
        if not (other() and self.state.global_step == 4):
            super()._save_rng_state(output_dir)


def killed():
    """Whether a run resumes exactly from the last whole checkpoint, where dropout needs the generators."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    run = arguments(FOLDER / "run", NAME, **saving)
    train(run, tiny_llama(attention_dropout=0.3), Killed)
    dist.barrier()
    if not other():
        shutil.rmtree(FOLDER / "run" / "checkpoint-6")  # a killed run has none
    dist.barrier()
    said = [lacks_generators(FOLDER / "run" / f"checkpoint-{step}") for step in (2, 4)]
    whole = train(arguments(FOLDER / "whole", NAME, **saving), tiny_llama(attention_dropout=0.3))
    resumed = train(run, tiny_llama(attention_dropout=0.3), resume=True)
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    return {"said": said, "equal": equal, "same": same_everywhere([*resumed.model.parameters()])}


def main():
    check, output, _ = sys.argv[1:]
    report(output, globals()[check], timeout=timedelta(seconds=60))


if __name__ == "__main__":
    main()
