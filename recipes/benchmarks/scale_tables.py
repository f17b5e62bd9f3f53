"""What a run takes on many GPUs, on paper: bytes that each of them holds and sends, and the work of refreshes.

    python recipes/benchmarks/scale_tables.py    # the tables of docs/scale.md and docs/large-scale.md

Counted from shapes by `hf_lowrank.estimate_memory(..., gpus, strategy)`; nothing is run. Seconds are bytes divided by
a speed and operations divided by a rate, both of which the table's head says: they are no measurements.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from hf_lowrank import MemoryEstimate, estimate_memory  # noqa: E402
from hf_lowrank.engine.schedule import owners  # noqa: E402
from hf_lowrank.hf.models import load_model  # noqa: E402
from hf_lowrank.planning.by_name import NAMES  # noqa: E402
from hf_lowrank.planning.memory import build_optimizer  # noqa: E402


BATCH, SEQ = 4, 2048
LINK = 50e9
"""Bytes per second that one GPU sends: 400 Gb/s."""
SHARDED = ("galore_i3s_adamw", "galore_i3s_adamw_8bit")
FP64 = 10e12
"""Operations per second of a decomposition in fp64: an assumption, a seventh of an H100's data sheet."""


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    rule = ["---", *("---:" for _ in head[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def strategies(model: str, rank: int, gpus: int) -> str:
    """Return what each strategy takes of one model."""
    head = ["", "strategy", "weights", "gradients", "state", "buckets, gathered layers", "activations", "in all"]
    head += ["sent in a step"]
    cases = [(optim, name) for optim in ("adamw_torch", "galore_i3s_adamw") for name in NAMES]
    cases += [("galore_i3s_adamw reduce_projected", "ddp"), ("galore_i3s_adamw_layerwise", "ddp")]
    cases += [(f"{optim} shard_basis", name) for optim in SHARDED for name in ("fsdp2", "hsdp")]
    rows = []
    for optim, name in cases:
        one = estimated(model, optim, rank, gpus, name)
        numbers = (one.weights, one.gradients, one.state, one.gathered, one.activations, one.total, one.sent.total)
        rows.append([shown(optim), name, *(f"{x / 1e9:.1f}" for x in numbers)])
    return table(head, rows)


def shown(asked: str) -> str:
    """Return a name and its options as text."""
    return ", ".join(f"`{word}`" for word in asked.split())


def estimated(model: str | nn.Module, asked: str, rank: int, gpus: int, strategy: str) -> MemoryEstimate:
    """Return an estimate at the tables' batch, activations recomputed; `asked` is a name, and options that are on."""
    optim, *options = asked.split()
    return estimate_memory(
        model,
        optim,
        rank=None if optim.startswith("adamw") else rank,
        batch=BATCH,
        seq=SEQ,
        checkpointing=True,
        gpus=gpus,
        strategy=strategy,
        options=dict.fromkeys(options, True),
    )


def large(model: str, rank: int, optims: tuple[str, ...], counts: tuple[int, ...]) -> str:
    """Return a row per method and number of GPUs, sharded by FSDP2 over all of them."""
    net = load_model(model)
    head = [
        "",
        "GPUs",
        "weights, gradients",
        "state",
        "in all",
        "sent: model",
        "sent: optimizer",
        "s",
        "refresh, TFLOP",
        "s",
    ]
    rows = []
    for optim in optims:
        for gpus in counts:
            one = estimated(net, optim, rank, gpus, "fsdp2")
            mine = one.sent.step + one.sent.refresh
            work = 0.0 if optim.startswith("adamw") else most_work(net, optim.split()[0], rank, gpus)
            rows.append(
                [
                    shown(optim),
                    f"{gpus}",
                    *(f"{x / 1e9:.1f}" for x in (one.weights + one.gradients, one.state, one.total)),
                    *(f"{x / 1e9:.1f}" for x in (one.sent.total - mine, mine)),
                    f"{one.sent.total / LINK:.1f}",
                    f"{work / 1e12:.1f}" if work else "-",
                    f"{work / FP64:.1f}" if work else "-",
                ]
            )
    return table(head, rows)


def most_work(net: nn.Module, optim: str, rank: int, gpus: int) -> float:
    """Return the operations of the process that has most to do when all bases are refreshed by `gram`: 2 m^2 n of the
    Gram matrix, 9 m^3 of its eigenvectors."""
    costs = []
    for _, p, config, _ in build_optimizer(net, optim, rank, {}).declared():
        if config.low_rank and config.options.get("refresh") == "gram":
            m, n = sorted(p.shape)
            costs.append(2.0 * m * m * n + 9.0 * m**3)
    load = [0.0] * gpus
    for cost, rank_ in zip(costs, owners(costs, gpus), strict=True):
        load[rank_] += cost
    return max(load)


def main() -> None:
    """Print all tables."""
    torch.set_num_threads(1)
    print(f"7B at rank 1024 on 8 GPUs, bf16, {BATCH} x {SEQ} tokens on each, activations recomputed; GB\n")
    print(strategies("7b", 1024, 8))
    methods = (
        "adamw_torch",
        "galore_i3s_adamw",
        *(f"{optim} shard_basis" for optim in SHARDED),
        "apollo_random_adamw",
    )
    for model, rank in (("70b", 2048), ("405b", 4096)):
        rates = f"seconds at {LINK / 1e9:.0f} GB/s and {FP64 / 1e12:.0f} TFLOP/s"
        print(f"\n{model} at rank {rank}, FSDP2 over all GPUs; GB, {rates}\n")
        print(large(model, rank, methods, (64, 512, 4096)))


if __name__ == "__main__":
    main()
