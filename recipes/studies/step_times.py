"""What a step of every row's optimizer takes: all rows in turn, in one run on one thread, beside the model's own part.

    python recipes/studies/step_times.py                 # measures the small model's rows, writes step_times.json
    python recipes/studies/step_times.py --print         # the table alone

The runs that compare_methods.py records stood beside others, so that their times do not compare. Here every row takes
one step, then the next row, on gradients of one batch of the text; leave the machine alone while it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

import torch
from torch import nn
from transformers import LlamaForCausalLM


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from recipes.shared.common import machine, require_at_least  # noqa: E402
from recipes.shared.display import markdown  # noqa: E402
from recipes.shared.lines import read_json, require_file  # noqa: E402
from recipes.studies.compare_rows import ROWS, START, Row  # noqa: E402
from recipes.studies.compare_training import (  # noqa: E402
    BATCH,
    BLOCK,
    GAP,
    SIZES,
    Run,
    Text,
    llama_config,
    optimizer_of,
    read,
)


FILE = HERE / "step_times.json"
MODEL, BESIDE = "forward and backward", "fira_adamw"


def loss_of(model: nn.Module, text: Text) -> torch.Tensor:
    """Return the loss of one batch."""
    rows = text.training.rows[:BATCH]
    loss: torch.Tensor = model(input_ids=rows, labels=rows).loss
    return loss


def measured(rows: Sequence[Row], size: str, intervals: int, text: Text) -> dict[str, dict[str, float]]:
    """Return the milliseconds of an optimizer's step by row, and of the model's forward and backward.

    Args:
        rows: which.
        size: of the model.
        intervals: how many times as many steps as lie between two refreshes; of their means the least counts.
        text: what the gradients are of.

    Returns:
        `median` of all steps after the first; `mean`, which has the refreshes in it.
    """
    config, steps = llama_config(SIZES[size], text.tokenizer, BLOCK), GAP * intervals
    optimizers = {}
    for row in rows:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        optimizers[row.name] = optimizer_of(Run(row, START, size, steps, 0), model)[0]
        loss_of(model, text).backward()
        optimizers[row.name].step()  # the first basis, and the state's memory
    model = LlamaForCausalLM(config)
    found: dict[str, list[float]] = {name: [] for name in (*optimizers, MODEL)}
    for _ in range(steps):
        for name in found:
            start = time.perf_counter()
            if name == MODEL:
                loss_of(model, text).backward()
            else:
                optimizers[name].step()
            found[name].append(1e3 * (time.perf_counter() - start))
    parts = {name: [ms[i : i + GAP] for i in range(0, steps, GAP)] for name, ms in found.items()}
    return {name: {"median": median(ms), "mean": min(map(mean, parts[name]))} for name, ms in found.items()}


def table(times: dict[str, dict[str, float]]) -> str:
    """Return the times as Markdown, the shortest first, and their ratio to Fira's."""
    beside = times[BESIDE]["mean"] if BESIDE in times else None
    ranked = sorted(times.items(), key=lambda item: item[1]["mean"])
    lines = [
        [name, f"{ms['median']:.1f}", f"{ms['mean']:.1f}", f"{ms['mean'] / beside:.2f}" if beside else "-"]
        for name, ms in ranked
    ]
    return markdown(["row", "median, ms", "mean with refreshes, ms", f"x {BESIDE}'s"], lines)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=SIZES, help="of the model")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all")
    parser.add_argument("--intervals", type=int, default=3, help="steps, in units of those between two refreshes")
    parser.add_argument("--file", type=Path, default=FILE, help="where the times are kept, by size")
    parser.add_argument("--print", action="store_true", help="print what is kept, and measure nothing")
    args = parser.parse_args()
    require_at_least(1, intervals=args.intervals)
    require_file(args.file)
    kept = read_json(args.file) if args.file.exists() else {}
    if not args.print:
        torch.set_num_threads(1)
        times = measured([ROWS[name] for name in args.rows or ROWS], args.size, args.intervals, read())
        kept[args.size] = {"machine": machine(), "milliseconds": times}
        args.file.write_text(json.dumps(kept, indent=1) + "\n")
    if args.size not in kept:
        parser.error(f"{args.file} has no times of {args.size}")
    print(f"{args.size}: {kept[args.size]['machine']}\n\n{table(kept[args.size]['milliseconds'])}")


if __name__ == "__main__":
    main()
