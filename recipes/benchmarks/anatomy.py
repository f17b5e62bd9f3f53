"""What one step crosses, and how often options are resolved: Python calls and modules, counted by the interpreter.

    python recipes/benchmarks/anatomy.py

Prints, for one ordinary step of one matrix (512 x 1376, rank 128), alone or beside a vector: Python calls of the
package, Python calls of any file, modules of the package that are crossed, and moves between them; the same for a step
with a refresh; and for `Trainer.create_optimizer`: how many optimizers are built, how often a method is resolved
and an option is parsed.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hf_lowrank
from hf_lowrank import LowRankOptimizer


PACKAGE = str(Path(hf_lowrank.__file__).parent)
NAMES = ("galore_dominant_adamw", "galore_i3s_adamw", "fira_i3s_adamw", "apollo_random_adamw")


def traced(work: Callable[[], Any]) -> tuple[Counter[str], int, list[str]]:
    """Return how often every function of the package was called, Python calls of any file, and the way from module to
    module."""
    functions: Counter[str] = Counter()
    calls, way = 0, list[str]()

    def look(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event != "call":
            return
        calls += 1
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            module = file.removeprefix(PACKAGE).strip("/").removesuffix(".py")
            functions[f"{module}:{frame.f_code.co_name}"] += 1
            if not way or way[-1] != module:
                way.append(module)

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return functions, calls, way


def step_of(name: str, *, gap: int, vector: bool) -> tuple[int, int, list[str]]:
    """Return the package's calls, all calls and the way of the fourth step of a matrix, and of a vector beside it."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(512, 1376) * 0.02)]
    groups = [{"params": weights[:], "rank": 128, "update_proj_gap": gap}]
    if vector:
        weights.append(torch.nn.Parameter(torch.zeros(512)))
        groups.append({"params": weights[1:]})
    optimizer = LowRankOptimizer(groups, name, lr=1e-3)
    for step in range(4):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        if step < 3:
            optimizer.step()
    functions, calls, way = traced(optimizer.step)
    return functions.total(), calls, way


def create_optimizer(folder: str) -> Counter[str]:
    """Return how often every function of the package was called while Trainer made its optimizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    hf_lowrank.register()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes))
    arguments = TrainingArguments(
        folder, optim="galore_i3s_adamw", optim_args="rank=4,update_proj_gap=5", report_to="none", use_cpu=True
    )
    trainer = Trainer(model, arguments)
    functions, _, _ = traced(trainer.create_optimizer)
    return functions


def main() -> None:
    """Print the tables."""
    head = ("method", "of", "step", "calls of the package", "all Python calls", "modules", "moves", "which")
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for name in NAMES:
        for vector, kind, gap in ((False, "ordinary", 1000), (True, "ordinary", 1000), (False, "with a refresh", 1)):
            own, calls, way = step_of(name, gap=gap, vector=vector)
            of, modules = "a matrix and a vector" if vector else "a matrix", dict.fromkeys(way)
            cells = (name, of, kind, own, calls, len(modules), len(way) - 1, ", ".join(modules))
            print("| " + " | ".join(map(str, cells)) + " |")
    with tempfile.TemporaryDirectory() as folder:
        functions = create_optimizer(folder)
    built, resolved, parsed = (
        functions[key] for key in ("optimizer:__init__", "methods/resolve:of", "methods/options:parse")
    )
    print(f"\ncreate_optimizer: {built} optimizer built, resolved {resolved} time(s), {parsed} options parsed")


if __name__ == "__main__":
    main()
