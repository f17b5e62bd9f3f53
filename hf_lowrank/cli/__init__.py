"""`hf-lowrank`: questions that are asked before and after training. What needs no torch does not import it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

from hf_lowrank import __version__


try:
    import typer
    from rich.markup import escape

    from hf_lowrank.cli import methods, models, runs
except ModuleNotFoundError as missing:  # the console script comes with the package, what it needs with an extra
    print(
        f"hf-lowrank needs the package {missing.name}: pip install {missing.name} (the extra 'cli' has all it needs)",
        file=sys.stderr,
    )
    sys.exit(2)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Train with: python -m hf_lowrank run_clm.py --optim galore_i3s_adamw --optim_args rank=128 ...",
)


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


def _add(name: str, command: Callable[..., Any], *examples: str) -> None:
    """Add a command with examples below its help."""
    shown = "\n\n".join(f"[cyan]{escape(line)}[/cyan]" for line in examples)
    app.command(name, epilog=f"Examples:\n\n{shown}")(command)


_add(
    "methods",
    methods.list_methods,
    "hf-lowrank methods",
    "hf-lowrank methods --full",
    "hf-lowrank methods fira --details",
    "hf-lowrank methods '*_i3s_*' --json",
)
_add(
    "targets",
    models.targets,
    "hf-lowrank targets 60m --optim-args rank=128",
    "hf-lowrank targets HuggingFaceTB/SmolLM2-135M -o fira_adamw_8bit --optim-args rank=0.25",
    "hf-lowrank targets runs/my_model/config.json --target-modules 'q_proj,v_proj' --json",
)
_add(
    "memory",
    models.memory,
    "hf-lowrank memory 7b --rank 1024 --batch 16",
    "hf-lowrank memory 7b --optim galore_i3s_adamw_8bit_layerwise --checkpointing",
    "hf-lowrank memory 7b --budget 24GB",
)
_add(
    "report",
    runs.report,
    "hf-lowrank report runs/i3s",
    "hf-lowrank report runs/adamw runs/i3s runs/fira --out compared",
)
_add("env", runs.env, "hf-lowrank env", "hf-lowrank env runs/i3s", "hf-lowrank env runs/i3s --json")
