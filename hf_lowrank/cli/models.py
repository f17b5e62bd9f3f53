"""`hf-lowrank targets` and `memory`: what an optimizer would do to a model, and what it would cost."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.markup import escape

from hf_lowrank.cli.printing import AsJson, show, table
from hf_lowrank.methods import options as opt
from hf_lowrank.methods import resolve
from hf_lowrank.methods.common import ReplicaOptions
from hf_lowrank.methods.dense import SAME
from hf_lowrank.methods.options import split_assignments
from hf_lowrank.observe.units import MIB, parse_bytes
from hf_lowrank.planning.hub import check_within_reach


_MODEL = "Hub id, folder with a config.json, such a file, or a built-in size: 60m, 130m, 350m, 1b, 7b, ..."
Model = Annotated[str, typer.Argument(help=_MODEL, show_default=False)]
Optim = Annotated[str, typer.Option("--optim", "-o", help="Name of the optimizer, as for --optim of the Trainer.")]
OptimArgs = Annotated[
    str,
    typer.Option("--optim-args", "--optim_args", help="Options as option=value,option=value, as for the Trainer."),
]


def targets(
    model: Model,
    optim: Optim = "galore_i3s_adamw",
    optim_args: OptimArgs = "",
    target_modules: Annotated[
        str, typer.Option(help="Which matrices: a regular expression, or names separated by commas.")
    ] = "all-linear",
    as_json: AsJson = False,
) -> None:
    """Show which matrices of a model would get a subspace, at which rank, and the optimizer state that this saves.

    Only the configuration is read: no weights, and no memory for them.
    """
    options: dict[str, Any] = split_assignments(optim_args)
    resolve.split(optim)
    check_within_reach(model)  # before torch is imported
    from hf_lowrank import layer_sampling

    layer_sampling.take(options)  # what the Trainer takes, and what changes nothing here
    options = {key: value for key, value in options.items() if key not in opt.schema(ReplicaOptions)}
    resolve.Config.of(optim, options, model=True)  # refuse what is wrong before looking at the model
    from hf_lowrank.hf.models import load_model
    from hf_lowrank.planning.targets import plan

    rows = plan(load_model(model), optim, target_modules=target_modules, **options)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    shown = table("parameters", "number", "shape", "rank", "state MiB", "AdamW MiB", "saved", right=(1, 3, 4, 5, 6))
    for row in sorted(rows, key=lambda row: row.rank is None):
        saved = _less(row.state_bytes, row.adamw_bytes) if row.rank else "-"
        sizes = (f"{n / MIB:,.2f}" for n in (row.state_bytes, row.adamw_bytes))
        shape = " x ".join(map(str, row.shape))
        dense = "dense" if row.rule == SAME else f"dense, {row.rule}"
        rank = "whole" if row.whole else str(row.rank or dense)
        shown.add_row(row.name, str(row.count), shape, rank, *sizes, saved)
    show(shown)
    state, adamw = (sum(getattr(row, key) for row in rows) for key in ("state_bytes", "adamw_bytes"))
    matrices, others = (sum(row.count for row in rows if bool(row.rank) is low_rank) for low_rank in (True, False))
    place = "stepped whole" if any(row.whole for row in rows) else "in a subspace"
    show(
        f"\n{optim}: {matrices} matrices {place}, {others} parameters dense; "
        f"state {state / MIB:,.1f} MiB, AdamW's {adamw / MIB:,.1f} MiB ({_less(state, adamw)} less)"
    )


def _less(ours: int, adamw: int) -> str:
    """Return what is saved in per cent; no sign before a zero."""
    return f"{round(100 * (1 - ours / adamw))}%"


def memory(
    model: Model,
    optim: Optim = "galore_i3s_adamw",
    rank: Annotated[float, typer.Option(help="Dimension of the subspace; 0: the method's default.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Sequences in one (micro-)batch.")] = 1,
    seq: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 256,
    dtype: Annotated[str, typer.Option(help="Type of weights, gradients, activations: bf16, fp16, fp32.")] = "bf16",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    optim_args: OptimArgs = "",
    gpus: Annotated[int, typer.Option(help="Processes, of one GPU each; the batch is each one's.", min=1)] = 1,
    strategy: Annotated[
        str, typer.Option(help="How they share: ddp, ddp_sharded, fsdp2, hsdp, tp, or all of them: all.")
    ] = "",
    budget: Annotated[str, typer.Option(help="Instead: what fits into this much (24GB, 24GiB)?")] = "",
    as_json: AsJson = False,
) -> None:
    """Count the bytes of a training run before it starts, on each of some GPUs, or say what fits into a budget.

    Weights, gradients and optimizer state are exact; activations follow a rule of thumb, and the accelerator's own
    context (about 0.5 GB under CUDA) is not counted. Activations are gone when a step needs its workspace: the larger
    of the two counts.
    """
    options = split_assignments(optim_args)
    rank = int(rank) if rank >= 1 and rank == int(rank) else rank
    if rank and "rank" in options:
        raise ValueError(f"the rank is given twice: --rank {rank:g} and rank={options['rank']} in --optim-args")
    from hf_lowrank.planning.budget import fit_budget
    from hf_lowrank.planning.by_name import NAMES, DoesNotRun, possible
    from hf_lowrank.planning.memory import ADAMW, estimate_memory

    row = optim if optim in ADAMW and not budget else resolve.split(optim)[0]
    if budget and (checkpointing or row != optim):
        raise ValueError(f"--budget tries 8-bit state, layerwise and checkpointing by itself: give it {row} alone")
    check_within_reach(model)

    shared: dict[str, Any] = {"batch": batch, "seq": seq, "dtype": dtype, "options": options, "gpus": gpus}
    if strategy == "all" and gpus == 1:
        raise ValueError("--strategy all needs --gpus")
    strategies = possible(gpus) if strategy == "all" else (strategy,)
    if strategy == "all" and (left := [name for name in NAMES if name not in strategies]):
        print(f"hf-lowrank: left out {', '.join(left)}, which {gpus} GPUs cannot be divided for", file=sys.stderr)
    found = []
    for one in strategies:
        try:
            if budget:
                ranks = [rank] if rank else None
                found += fit_budget(model, parse_bytes(budget), optim, ranks=ranks, strategy=one, **shared)
            else:
                how = {"rank": rank or None, "checkpointing": checkpointing, "strategy": one, **shared}
                found.append(estimate_memory(model, optim, **how))
        except DoesNotRun as error:
            if strategy != "all":
                raise
            print(f"hf-lowrank: left out {one}: {error}", file=sys.stderr)
    if found and found[0].rank is None and (rank or "rank" in options):
        print(f"hf-lowrank: {optim} has no subspace, so rank has no effect", file=sys.stderr)
    if as_json:
        print(json.dumps([estimate.as_dict() for estimate in found], indent=2))
    elif not found:
        print(f"hf-lowrank: {model} does not fit into {budget} at batch {batch} x {seq} in any mode", file=sys.stderr)
        raise typer.Exit(1)
    else:
        _print_memory(found)


def _print_memory(found: list[Any]) -> None:
    """Print estimates side by side: GB, that is 10^9 bytes."""
    columns = ["weights", "gradients", "low_rank_state", "dense_state", "passing"]
    heads = ["weights", "gradients", "matrices' state", "dense state", "activations or step"]
    one = found[0]
    if one.gpus > 1:
        columns, heads = [*columns, "gathered"], [*heads, "gathered"]
    heads = [*heads, "total GB", *(["sent per step"] if one.gpus > 1 else [])]
    shown = table("optimizer", "rank", "mode", *heads, right=(1, *range(3, 3 + len(heads))), no_wrap=("optimizer",))
    for one in found:
        modes = [one.strategy] if one.strategy else []
        modes += [mode for mode in ("layerwise", "checkpointing") if getattr(one, mode)]
        sizes = [getattr(one, column) for column in columns] + [one.total] + [one.sent.total] * (one.gpus > 1)
        shown.add_row(one.optim, f"{one.rank or '-'}", ", ".join(modes) or "-", *(f"{x / 1e9:,.2f}" for x in sizes))
    parameters = f"{one.parameters / 1e6:,.1f} M parameters"
    batch = f"{one.dtype}, batch {one.batch} x {one.seq} tokens"
    many = f" on each of {one.gpus} GPUs; bytes of the one that holds most" if one.gpus > 1 else ""
    show(f"{escape(one.model)}: {parameters}, {batch}{many}")
    show(shown)
