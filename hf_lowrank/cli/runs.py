"""`hf-lowrank report` and `env`: what became of runs, and how they were set up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hf_lowrank.cli.printing import AsJson, show, table


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


def env(
    run: Annotated[
        Path | None, typer.Argument(help="Output folder of a run: also its method, options and shapes.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print versions and devices, and how a run was set up: what a report of a problem needs."""
    from hf_lowrank.observe import environment

    started = {} if run is None else {"run": environment.run(run)}  # refused before torch is imported
    found = environment.environment() | started
    if as_json:
        print(json.dumps(found, indent=2))
        return
    versions = {**found["versions"], "platform": found["platform"], "devices": "; ".join(found["devices"])}
    show("\n".join(f"{key:14}{escape(value)}" for key, value in versions.items()))
    for made in started.values():
        options = ", ".join(f"{key}={value}" for key, value in made["options"].items())
        show(f"\n{'method':14}{made['method']}\n{'options':14}{escape(options)}\n")
        shown = table("parameters", "number", "shape", "rank", right=(1, 3))
        for row in made["parameters"]:
            shown.add_row(row["name"], str(row["number"]), row["shape"], str(row["rank"] or "dense"))
        show(shown)
