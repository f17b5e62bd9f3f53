"""What the callback costs: its own time in every event, as a share of the training steps, by Trainer's own loop.

Every event of LowRankCallback is timed, on one machine and in one run, so that nothing is compared across runs.

    python recipes/benchmarks/callback_cost.py --size 60m --steps 40 --optim galore_i3s_adamw
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, trainer

import hf_lowrank
from hf_lowrank.hf.models import LLAMA, llama_config
from hf_lowrank.observe import records


class Timed(hf_lowrank.LowRankCallback):
    """The callback with a clock around each of its events."""

    seconds: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("on_") or not callable(found):
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return found(*args, **kwargs)
            finally:
                Timed.seconds[name] += perf_counter() - start
                Timed.calls[name] += 1

        return timed


def measure(args: argparse.Namespace, folder: str) -> float:
    """Train on random tokens; return the seconds of all steps, checkpoints aside."""
    hf_lowrank.register()
    trainer.DEFAULT_CALLBACKS[:] = [
        Timed if callback is hf_lowrank.LowRankCallback else callback for callback in trainer.DEFAULT_CALLBACKS
    ]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**llama_config(args.size)))
    rows = [torch.randint(0, model.config.vocab_size, (args.seq,)) for _ in range(64)]
    arguments = TrainingArguments(
        folder,
        optim=args.optim,
        optim_args=f"rank={args.rank},update_proj_gap={args.gap}",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        logging_steps=args.logging_steps,
        save_strategy="steps",
        save_steps=args.save_steps,
        save_only_model=True,
        report_to="none",
        disable_tqdm=True,
    )
    run = Trainer(model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in rows])
    run.train()
    steps, _ = records.read(Path(folder) / records.STEPS_FILE)
    return sum(row["ms"] for row in steps) / 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=LLAMA, default="60m")
    parser.add_argument("--optim", default="galore_i3s_adamw")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--gap", type=int, default=20, help="steps between refreshes; the methods' default is 200")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--save-steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        total = measure(args, folder)
    print(f"LLaMA-{args.size}, {args.optim}, rank {args.rank}, {args.batch} x {args.seq} tokens, {args.steps} steps;")
    print(f"refreshes every {args.gap}, logs every {args.logging_steps}, checkpoints every {args.save_steps} steps\n")
    print("| event | calls | ms per call | share of the steps |\n|---|---:|---:|---:|")
    for name, seconds in sorted(Timed.seconds.items(), key=lambda item: -item[1]):
        calls = Timed.calls[name]
        print(f"| {name} | {calls} | {1e3 * seconds / calls:.3f} | {seconds / total:.3%} |")
    once = Timed.seconds["on_train_begin"]
    print(f"\nsteps: {total:.1f} s; the callback: {(sum(Timed.seconds.values()) - once) / total:.2%} of it")


if __name__ == "__main__":
    main()
