"""What the papers say of subspaces, looked at while a small LLaMA trains: overlaps, ranks of the update, spikes.

    python recipes/studies/subspaces.py           # trains what is missing, then prints the tables
    python recipes/studies/subspaces.py --print   # the tables alone

Model, text and batches are those of compare_methods.py; nothing is tuned: all rows have one rate. A finished run is a
line of subspaces.jsonl, and is not run again.

* Overlap ||P_t^T P_(t-1)||_F^2 / r of adjacent bases, over the run: does the dominant subspace freeze, and does I3S
  keep it moving (arXiv 2502.05790, section 4.4)?
* Effective rank (sum of sigma^2)^2 / sum of sigma^4 of what training has added to a matrix, over its short side: is
  I3S' higher (the same)?
* Spikes: steps whose loss is above the median of the 20 before by more than six of their median deviations. Does
  uniform sampling have more (the same, section 4.5)?
* Reproducible directions (arXiv 2607.05872): of the leading `rank` singular vectors of a gradient, how many does
  another batch of the same step have? The sum of squared cosines between both subspaces, beside that of one batch and
  another 100 steps later.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, get_cosine_schedule_with_warmup


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from hf_lowrank import LowRankOptimizer, param_groups, target_parameters  # noqa: E402
from hf_lowrank.observe.update_rank import effective_rank  # noqa: E402
from recipes.quickstart.run_clm import llama_config  # noqa: E402
from recipes.shared.common import machine, require_at_least  # noqa: E402
from recipes.shared.display import markdown  # noqa: E402
from recipes.shared.lines import Lines, require_file  # noqa: E402
from recipes.studies.compare_methods import only_one  # noqa: E402
from recipes.studies.compare_rows import FIXED  # noqa: E402
from recipes.studies.compare_tables import interval, text  # noqa: E402
from recipes.studies.compare_training import BATCH, BLOCK, SIZES, Text, batches, read  # noqa: E402


FILE = HERE / "subspaces.jsonl"
METHODS = ("galore_dominant_adamw", "galore_i3s_adamw", "galore_uniform_adamw", "galore_random_adamw", "full_adamw")
RATE, OTHER_RATE, SCALE, GAP, LATER = 4e-3, 4e-2, 0.25, 25, 100
BEFORE, DEVIATIONS = 20, 6.0
"""A spike is looked for above the median of so many steps, by so many median deviations."""

SETTING = (
    f"sotu; fp32, {BATCH} x {BLOCK} tokens, rank a quarter of the width, gap {GAP}, rates {RATE:g} / scale {SCALE:g} "
    f"and {OTHER_RATE:g}, clipping 1, cosine; a spike is {DEVIATIONS:g} deviations above {BEFORE} steps; "
    f"{LATER} steps apart"
)
"""What is the same for all runs; part of every record, so that a change of it makes new ones."""


def train(method: str, size: str, steps: int, seed: int, text: Text) -> dict[str, Any]:
    """Train one model, and look.

    Returns:
        `overlaps`: of adjacent bases, the mean over matrices for each refresh but the first; `effective_rank`: of what
        was added to a matrix over its short side, the mean over matrices; `spikes`: how many steps; `same`, `later`:
        directions that the gradients of two batches share at one step, and of two steps `LATER` apart, as [step,
        number] pairs, means over matrices.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(SIZES[size], text.tokenizer, BLOCK))
    names = list(target_parameters(model, rank=1))
    matrices = [model.get_parameter(name) for name in names]
    start = [p.detach().clone() for p in matrices]
    rank = SIZES[size].hidden_size // 4
    low_rank = {} if method.startswith("full") else {"rank": rank, "update_proj_gap": GAP}
    optimizer = optimizer_of(model, method, low_rank, seed)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    order, losses, overlaps = batches(len(text.training), seed), list[float](), list[float]()
    probes: dict[str, list[list[float]]] = {"same": [], "later": []}
    previous: list[Tensor] | None = None
    for step in range(steps):
        if step % LATER == 0:
            halves = text.training.rows[next(order)], text.training.rows[next(order)]
            found = [leading(model, matrices, rows, rank) for rows in halves]
            probes["same"].append([step, shared(*found)])
            if previous is not None:
                probes["later"].append([step, shared(previous, found[0])])
            previous = found[0]
        rows = text.training.rows[next(order)]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if low_rank and step and step % GAP == 0:
            overlaps.append(mean(float(optimizer.state[p]["report"][0]) for p in matrices))
    added = [p.detach() - p0 for p, p0 in zip(matrices, start, strict=True)]
    return {
        "overlaps": overlaps,
        "effective_rank": mean(float(effective_rank(gram(x))) / min(x.shape) for x in added),
        "spikes": len(spikes(losses)),
        "train_loss": mean(losses[-50:]),
        **probes,
        "machine": machine(),
    }


def optimizer_of(model: nn.Module, method: str, low_rank: Mapping[str, Any], seed: int) -> LowRankOptimizer:
    """Return an optimizer whose matrices learn at RATE in all, and all else at OTHER_RATE by AdamW."""
    groups = param_groups(model, method=method, **FIXED, **low_rank)
    for group in groups:
        group["lr"] = RATE / (SCALE if low_rank else 1.0) if "rank" in group else OTHER_RATE
    return LowRankOptimizer(groups, method, seed=seed)


def leading(model: nn.Module, matrices: Sequence[Tensor], rows: Tensor, rank: int) -> list[Tensor]:
    """Return the leading left singular vectors (short side, rank) of every matrix's gradient for one batch."""
    loss = model(input_ids=rows, labels=rows).loss
    grads = torch.autograd.grad(loss, list(matrices))
    wide = [G if G.shape[0] <= G.shape[1] else G.mT for G in grads]
    return [torch.linalg.svd(G.double(), full_matrices=False)[0][:, :rank] for G in wide]


def shared(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return ||P^T Q||_F^2, the number of directions that two subspaces share, the mean over matrices."""
    return mean(float((P.mT @ Q).square().sum()) for P, Q in zip(some, others, strict=True))


def gram(x: Tensor) -> Tensor:
    """Return the Gram matrix on the short side, in float64."""
    wide = (x if x.shape[0] <= x.shape[1] else x.mT).double()
    return wide @ wide.mT


def spikes(losses: Sequence[float]) -> list[int]:
    """Return the steps at which the loss leaps above those before."""
    found = []
    for step in range(BEFORE, len(losses)):
        before = losses[step - BEFORE : step]
        middle = median(before)
        if losses[step] > middle + DEVIATIONS * median(abs(x - middle) for x in before):
            found.append(step)
    return found


def tables(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return what is recorded as Markdown: a line for each method, means over seeds with 95 % intervals."""
    lines, probes = [], []
    for method in dict.fromkeys(run["method"] for run in runs):
        some = [run for run in runs if run["method"] == method]
        thirds = [[mean(third(run["overlaps"], i)) for run in some if run["overlaps"]] for i in range(3)]
        numbers = [*thirds, [run["effective_rank"] for run in some], [run["spikes"] for run in some]]
        lines.append([method, *(text(interval(x)) if x else "-" for x in numbers), str(len(some))])
        same = [mean(n for _, n in run["same"]) for run in some]
        later = [mean(n for _, n in run["later"]) for run in some if run["later"]]
        probes.append([method, *(text(interval(x)) if x else "-" for x in (same, later))])
    head = ["row", "overlap, first third", "second", "last", "effective rank of the change", "spikes", "seeds"]
    directions = markdown(["row", "shared by two batches of one step", f"{LATER} steps apart"], probes)
    return f"{markdown(head, lines)}\n\n{directions}"


def third(values: Sequence[float], i: int) -> Sequence[float]:
    """Return the first, second or last third."""
    return values[len(values) * i // 3 : len(values) * (i + 1) // 3]


def main() -> None:
    """Train what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FILE, help="where results are recorded")
    parser.add_argument("--size", default="small", choices=SIZES, help="of the model")
    parser.add_argument("--steps", type=int, default=600, help=f"of a training; {BATCH * BLOCK} tokens each")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1 on")
    parser.add_argument("--print", action="store_true", help="print the tables of what is recorded, and run nothing")
    args = parser.parse_args()
    require_at_least(1, seeds=args.seeds)
    require_file(args.file)
    require_at_least(3 * GAP + 1, steps=args.steps)  # for a third each
    torch.set_num_threads(1)
    wanted = {"size": args.size, "steps": args.steps, "setting": SETTING}
    if not args.print:
        with only_one(args.file):
            record = Lines(args.file)
            for key in [{**wanted, "seed": s, "method": m} for s in range(1, args.seeds + 1) for m in METHODS]:
                if not any(key.items() <= run.items() for run in record.runs):
                    record.write({**key, **train(key["method"], args.size, args.steps, key["seed"], read())})
    print(tables([run for run in Lines(args.file).runs if wanted.items() <= run.items()]))


if __name__ == "__main__":
    main()
