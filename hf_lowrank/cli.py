"""`hf-lowrank`: questions that are asked before and after training. What needs no torch does not import it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from hf_lowrank import __version__, methods
from hf_lowrank.options import split_assignments


try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ModuleNotFoundError as missing:  # the console script comes with the package, what it needs with an extra
    sys.exit(f"hf-lowrank needs the package {missing.name}: pip install 'hf_lowrank[cli]'")

MIB = 2**20

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Train with: python -m hf_lowrank run_clm.py --optim galore_i3s_adamw --optim_args rank=128 ...",
)

_MODEL = "Hub id, folder with a config.json, such a file, or a built-in size: llama-60m, 130m, 350m, 1b, 7b, ..."
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
    "methods", epilog=_examples("hf-lowrank methods", "hf-lowrank methods fira", "hf-lowrank methods '*_i3s_*' --json")
)
def list_methods(
    pattern: Annotated[
        str, typer.Argument(help="Part of a name, or a pattern with * and ?. Default: all.", show_default=False)
    ] = "*",
    options: Annotated[
        bool, typer.Option("--options", help="Also list each method's options (imports torch).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List the optimizers: their parts, their state per m x n matrix (m <= n, rank r), the paper, their limits.

    Every name also exists with [bold]_8bit[/bold], [bold]_layerwise[/bold] and [bold]_8bit_layerwise[/bold].
    """
    names = _matching(pattern)
    rows = [{"name": name, **_described(methods.METHODS[name])} for name in names]
    if options:
        for row, name in zip(rows, names, strict=True):
            row["options"] = methods.complete(name, {"rank": 128})
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = _table("name", "what it is", "parts", "state", "paper", "cannot", no_wrap=("name",))
    for row in rows:
        shown = " x ".join(row[kind] for kind in methods.KINDS)
        table.add_row(row["name"], row["summary"], shown, row["state"], row["paper"], row["limits"] or "-")
    _print(table)
    for row in rows if options else ():
        text = ", ".join(f"{key}={value}" for key, value in row["options"].items())
        _print(f"[bold]{row['name']}[/bold] {escape(text)}")
    if len(rows) > 1:
        _print("Each also with _8bit, _layerwise, _8bit_layerwise. m <= n are a matrix's sides, r is the rank.")


def _matching(pattern: str) -> list[str]:
    wild = pattern if set(pattern) & set("*?[") else f"*{pattern}*"
    if found := [name for name in methods.METHODS if fnmatchcase(name, wild)]:
        return found
    return [methods.split(pattern)[0]]  # a name with an ending, or an error that names the nearest


def _described(method: methods.Method) -> dict[str, Any]:
    parts = {kind: getattr(method, kind) for kind in methods.KINDS}
    shown = {kind: part if isinstance(part, str) else type(part).__name__ for kind, part in parts.items()}
    keys = ("summary", "paper", "state", "limits")
    return {**shown, **{key: getattr(method, key) for key in keys}}


@app.command(
    epilog=_examples(
        "hf-lowrank targets llama-60m --optim-args rank=128",
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
    from hf_lowrank.callback import summary
    from hf_lowrank.skeletons import load_skeleton
    from hf_lowrank.targets import plan

    options: dict[str, Any] = split_assignments(optim_args)
    methods.complete(optim, {"rank": 128, **options})  # refuse what is wrong before looking at the model
    optimizer, rows = plan(load_skeleton(model), optim, target_modules=target_modules, **options)
    if as_json:
        print(json.dumps({"summary": summary(optimizer), "parameters": [asdict(row) for row in rows]}, indent=2))
        return
    table = _table("parameters", "number", "shape", "rank", "state MiB", "AdamW MiB", "saved", right=(1, 3, 4, 5, 6))
    for row in sorted(rows, key=lambda row: row.rank is None):
        saved = f"{1 - row.state_bytes / row.adamw_bytes:.0%}" if row.rank else "-"
        sizes = (f"{n / MIB:,.2f}" for n in (row.state_bytes, row.adamw_bytes))
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.name, str(row.count), shape, str(row.rank or "dense"), *sizes, saved)
    _print(table)
    _print(escape(summary(optimizer)))


def _table(*columns: str, right: tuple[int, ...] = (), no_wrap: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i in right else "left", no_wrap=column in no_wrap)
    return table


def _print(what: Any) -> None:
    Console(soft_wrap=isinstance(what, str), highlight=False).print(what)


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
    from hf_lowrank.report import write_report

    result = write_report(runs, out, matrices=matrices)
    for problem in result.problems:
        print(f"hf-lowrank: {problem}", file=sys.stderr)
    print(f"{result.page} ({len(result.figures)} figures)")


if __name__ == "__main__":
    main()
