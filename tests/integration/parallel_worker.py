"""Trainer on several gloo processes: under DDP, or under accelerate's FSDP2 path.

Trainer ignores --fsdp where there is no accelerator, so the FSDP2 path is switched on by hand.

torchrun --nproc_per_node N parallel_worker.py ddp|shard_state|SHARDED_STATE_DICT|FULL_STATE_DICT OPTIM FOLDER
    [CHECKPOINT | best]
"""

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer, TrainerCallback
from transformers import trainer as transformer_trainer


sys.path.insert(0, str(Path(__file__).parent))
from conftest import CODED, arguments, engine, tiny_data, tiny_llama  # noqa: E402


STEPS = 6
OPTIONS = "rank=4,update_proj_gap=2,stagger=false"
REPLICAS = "ddp", "shard_state"
"""What runs under DistributedDataParallel."""


class FSDP2Trainer(Trainer):
    """A Trainer that shards on the CPU."""

    state_dict_type = "SHARDED_STATE_DICT"

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type=self.state_dict_type,
        )
        self.accelerator.state.fsdp_plugin = plugin
        self.accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # from which it is taken again
        self.is_fsdp_enabled = True


class Saved(TrainerCallback):
    """Keeps the weights of every checkpoint, by step."""

    def __init__(self):
        self.weights = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = whole(model)


def can_resume(kind):
    """transformers 4.57 cannot load any optimizer under DDP on the CPU: it asks torch for the device 'cpu:0'."""
    return kind not in REPLICAS or hasattr(transformer_trainer, "_OPTIMIZER_HANDLERS")


def whole(model):
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def logged(trainer):
    """Our rows of the log history, without times."""
    rows = [{k: v for k, v in row.items() if "lowrank" in k or k == "step"} for row in trainer.state.log_history]
    return [{k: v for k, v in row.items() if "refresh_ms" not in k} for row in rows if "lowrank/refreshes" in row]


def main():
    kind, optim, folder, *checkpoint = sys.argv[1:]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    trainer_class = Trainer if kind in REPLICAS else type("T", (FSDP2Trainer,), {"state_dict_type": kind})

    def train(output, resume=None, callbacks=(), **overrides):
        rows = 4 // int(os.environ["WORLD_SIZE"])
        args = arguments(
            Path(folder) / output,
            optim,
            optim_args=OPTIONS + ",shard_state=true" * (kind == "shard_state"),
            max_steps=STEPS,
            per_device_train_batch_size=rows,
            max_grad_norm=0.0,
            **overrides,
        )
        trainer = trainer_class(
            tiny_llama(**(CODED if "8bit" in optim else {})),
            args,
            train_dataset=tiny_data(),
            eval_dataset=tiny_data(),
            callbacks=[*callbacks],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    if checkpoint == ["best"]:
        every = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
        found = train("best", callbacks=[saved := Saved()], **every, **best)
        weights, step = whole(found.accelerator.unwrap_model(found.model)), found.state.best_global_step
        loaded = all(torch.equal(a, b) for a, b in zip(weights, saved.weights[step], strict=True))
        (Path(folder) / f"best{os.environ['RANK']}.json").write_text(
            json.dumps([step, found.state.best_model_checkpoint, loaded])
        )
        torch.distributed.barrier()
        os._exit(0)  # gloo's threads sometimes abort a normal exit
    if checkpoint:
        again = train("again", resume=checkpoint[0])
        if int(os.environ["RANK"]) == 0:
            torch.save(whole(again.accelerator.unwrap_model(again.model)), Path(folder) / "weights.pt")
        return
    first = train("first", save_strategy="steps", save_steps=3)
    weights = whole(first.accelerator.unwrap_model(first.model))
    exactly = alike = None
    if can_resume(kind):
        resumed = train("resumed", resume=str(Path(folder) / "first" / "checkpoint-3"))
        again = whole(resumed.accelerator.unwrap_model(resumed.model))
        exactly = all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
        alike = logged(resumed) == logged(first)
    kinds = sorted({type(p).__name__ for g in engine(first).param_groups for p in g["params"]})
    if int(os.environ["RANK"]) == 0:
        torch.save(weights, Path(folder) / "weights.pt")
        report = {
            "resumed exactly": exactly,
            "logged alike": alike,
            "optimizer": type(engine(first)).__name__,
            "parameters": kinds,
            "shared": engine(first).share_refreshes,
            "sharded": engine(first).shard_state,
            "states": len(engine(first).state),
            "logged": len(logged(first)),
            "coded": sum(x.dtype == torch.uint8 for s in engine(first).state.values() for x in s.values()),
        }
        (Path(folder) / "report.json").write_text(json.dumps(report))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort a normal exit


if __name__ == "__main__":
    main()
