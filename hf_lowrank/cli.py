"""`hf-lowrank`: questions that are asked before and after training. What needs no torch does not import it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from hf_lowrank import __version__
from hf_lowrank.methods import registry, resolve, table
from hf_lowrank.methods.options import split_assignments
from hf_lowrank.observe.units import MIB


try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ModuleNotFoundError as missing:  # the console script comes with the package, what it needs with an extra
    print(f"hf-lowrank needs the package {missing.name}: pip install 'hf_lowrank[cli]'", file=sys.stderr)
    sys.exit(2)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Train with: python -m hf_lowrank run_clm.py --optim galore_i3s_adamw --optim_args rank=128 ...",
)

_MODEL = "Hub id, folder with a config.json, such a file, or a built-in size: 60m, 130m, 350m, 1b, 7b, ..."
Model = Annotated[str, typer.Argument(help=_MODEL, show_default=False)]
Optim = Annotated[str, typer.Option("--optim", "-o", help="Name of the optimizer, as for --optim of the Trainer.")]
OptimArgs = Annotated[str, typer.Option(help="Options as option=value,option=value, as for the Trainer.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"[cyan]{escape(line)}[/cyan]" for line in lines)


def main() -> None:
    """Run a command; a user's mistake is one sentence on stderr and exit code 2."""
    try:
        app(prog_name="hf-lowrank")
    except ValueError as error:  # what the package raises for a name, an option or a file that is not valid
        print(f"hf-lowrank: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a folder that cannot be written, say
        print(f"hf-lowrank: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as missing:
        print(f"hf-lowrank: this command needs the package {missing.name}, which is not installed", file=sys.stderr)
        sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hf_lowrank {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Low-rank optimizers for the Hugging Face Trainer: which there are, what they do to a model, what they cost."""


@app.command(
    "methods",
    epilog=_examples("hf-lowrank methods", "hf-lowrank methods fira --details", "hf-lowrank methods '*_i3s_*' --json"),
)
def list_methods(
    pattern: Annotated[
        str, typer.Argument(help="Part of a name, or a pattern with * and ?. Default: all.", show_default=False)
    ] = "*",
    details: Annotated[
        bool, typer.Option("--details", help="Also the parts, the limits and every option with its default.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the optimizers, with their state per m x n matrix (m <= n, rank r) and the paper.

    Every name also exists with [bold]_8bit[/bold], [bold]_layerwise[/bold] and [bold]_8bit_layerwise[/bold].
    """
    rows = {name: _described(table.METHODS[name], name, details) for name in _matching(pattern)}
    if as_json:
        print(json.dumps([{"name": name, **row} for name, row in rows.items()], indent=2))
    elif details:
        for name, row in rows.items():
            _print(f"[bold]{name}[/bold]: {escape(row['summary'])}")
            shown = {key: value for key, value in row.items() if key not in ("summary", "options") and value}
            shown |= {f"  {key}": value for key, value in row["options"].items()}
            _print("\n".join(f"  {key:22} {escape(str(value))}" for key, value in shown.items()) + "\n")
    else:
        table = _table("name", "what it is", "state", "paper", no_wrap=("name", "state"))
        for name, row in rows.items():
            table.add_row(name, row["summary"], row["state"], row["paper"])
        _print(table)


def _matching(pattern: str) -> list[str]:
    wild = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    matching = {resolve.split(name)[0] for name in resolve.names() if fnmatchcase(name, wild)}  # endings as well
    if found := [name for name in table.METHODS if name in matching]:
        return found
    return [resolve.split(pattern)[0]]  # a name with an ending, or an error that names the nearest


def _described(method: table.Method, name: str, details: bool) -> dict[str, Any]:
    parts = {kind: getattr(method, kind) for kind in registry.KINDS}
    shown = {kind: part if isinstance(part, str) else type(part).__name__ for kind, part in parts.items()}
    row = {key: getattr(method, key) for key in ("summary", "state", "paper", "limits")} | shown
    return row | {"options": resolve.complete(name, {"rank": 128})} if details else row  # options import torch


@app.command(
    epilog=_examples(
        "hf-lowrank targets 60m --optim-args rank=128",
        "hf-lowrank targets HuggingFaceTB/SmolLM2-135M -o fira_adamw_8bit --optim-args rank=0.25",
        "hf-lowrank targets runs/my_model/config.json --target-modules 'q_proj,v_proj' --json",
    )
)
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
    from hf_lowrank.hf.models import load_model
    from hf_lowrank.planning.targets import plan

    options: dict[str, Any] = split_assignments(optim_args)
    resolve.complete(optim, {"rank": 128, **options})  # refuse what is wrong before looking at the model
    rows = plan(load_model(model), optim, target_modules=target_modules, **options)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = _table("parameters", "number", "shape", "rank", "state MiB", "AdamW MiB", "saved", right=(1, 3, 4, 5, 6))
    for row in sorted(rows, key=lambda row: row.rank is None):
        saved = f"{1 - row.state_bytes / row.adamw_bytes:.0%}" if row.rank else "-"
        sizes = (f"{n / MIB:,.2f}" for n in (row.state_bytes, row.adamw_bytes))
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.name, str(row.count), shape, str(row.rank or "dense"), *sizes, saved)
    _print(table)
    state, adamw = (sum(getattr(row, key) for row in rows) for key in ("state_bytes", "adamw_bytes"))
    projected, dense = (sum(row.count for row in rows if bool(row.rank) is low_rank) for low_rank in (True, False))
    _print(
        f"\n{optim}: {projected} matrices in a subspace, {dense} parameters dense; "
        f"state {state / MIB:,.1f} MiB, AdamW's {adamw / MIB:,.1f} MiB ({1 - state / adamw:.0%} less)"
    )


@app.command(
    epilog=_examples(
        "hf-lowrank memory 7b --rank 1024 --batch 16",
        "hf-lowrank memory 7b --optim galore_i3s_adamw_8bit_layerwise --checkpointing",
        "hf-lowrank memory 7b --budget 24GB",
    )
)
def memory(
    model: Model,
    optim: Optim = "galore_i3s_adamw",
    rank: Annotated[float, typer.Option(help="Dimension of the subspace; 0: the method's default.", min=0)] = 0,
    batch: Annotated[int, typer.Option(help="Sequences in one (micro-)batch.")] = 1,
    seq: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 256,
    dtype: Annotated[str, typer.Option(help="Type of weights, gradients, activations: bf16, fp16, fp32.")] = "bf16",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Recompute activations.")] = False,
    optim_args: OptimArgs = "",
    budget: Annotated[str, typer.Option(help="Instead: what fits into this much (24GB, 24GiB)?")] = "",
    as_json: AsJson = False,
) -> None:
    """Count the bytes of a training run before it starts, or say what fits into a budget.

    Weights, gradients and optimizer state are exact; activations follow a rule of thumb, and the accelerator's own
    context (about 0.5 GB under CUDA) is not counted.
    """
    from hf_lowrank.planning.memory import estimate_memory, fit_budget, parse_bytes

    options = split_assignments(optim_args)
    shared: dict[str, Any] = {"batch": batch, "seq": seq, "dtype": dtype, "options": options}
    if budget:
        ranks = [int(rank)] if rank else None
        found = fit_budget(model, parse_bytes(budget), optim, ranks=ranks, **shared)
    else:
        found = [estimate_memory(model, optim, rank=rank or None, checkpointing=checkpointing, **shared)]
    if as_json:
        print(json.dumps([estimate.as_dict() for estimate in found], indent=2))
    elif not found:
        print(f"hf-lowrank: {model} does not fit into {budget} at batch {batch} x {seq} in any mode", file=sys.stderr)
        raise typer.Exit(1)
    else:
        _print_memory(found)


def _print_memory(found: list[Any]) -> None:
    """Print estimates side by side: GB, that is 10^9 bytes."""
    columns = ("weights", "gradients", "low_rank_state", "dense_state", "activations", "total")
    heads = ("weights", "gradients", "matrices' state", "dense state", "activations", "total GB")
    table = _table("optimizer", "rank", "mode", *heads, right=(1, *range(3, 9)), no_wrap=("optimizer",))
    for one in found:
        modes = [mode for mode in ("layerwise", "checkpointing") if getattr(one, mode)]
        sizes = (f"{getattr(one, column) / 1e9:,.2f}" for column in columns)
        table.add_row(one.optim, f"{one.rank or '-'}", ", ".join(modes) or "-", *sizes)
    one = found[0]
    parameters = f"{one.parameters / 1e6:,.1f} M parameters"
    _print(f"{escape(one.model)}: {parameters}, {one.dtype}, batch {one.batch} x {one.seq} tokens")
    _print(table)


def _table(*columns: str, right: tuple[int, ...] = (), no_wrap: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        justify = "right" if i in right else "left"
        table.add_column(column, justify=justify, no_wrap=column in no_wrap, overflow="fold")  # type: ignore[arg-type]
    return table


def _print(what: Any) -> None:
    """Print to the terminal's width; into a pipe or file without one."""
    width = None if sys.stdout.isatty() else 200
    Console(soft_wrap=isinstance(what, str), highlight=False, width=width).print(what)


@app.command(
    epilog=_examples("hf-lowrank report runs/i3s", "hf-lowrank report runs/adamw runs/i3s runs/fira --out compared")
)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of runs; the first is the one to compare with.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write index.html and the PNG files into.")] = Path(
        "report"
    ),
    matrices: Annotated[
        int, typer.Option(min=0, help="Matrices per type whose weight differences are decomposed; 0: none.")
    ] = 2,
) -> None:
    """Draw what happened in one or more runs: one self-contained HTML page, and each figure as a PNG file.

    Loss and perplexity, subspaces, spectra of weight changes, memory and step times; whatever a folder holds. A run
    without our optimizers (AdamW, say) is drawn as far as its trainer_state.json goes.
    """
    from hf_lowrank.observe.report import write_report

    result = write_report(runs, out, matrices=matrices)
    for problem in result.problems:
        print(f"hf-lowrank: {problem}", file=sys.stderr)
    print(f"{result.page} ({len(result.figures)} figures)")


if __name__ == "__main__":
    main()
