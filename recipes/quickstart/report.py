"""What a quickstart leaves behind: numbers, a table and pictures."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.shared.common import machine  # noqa: E402
from recipes.shared.display import COLOURS, MARKERS, markdown  # noqa: E402


MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

COLUMNS = {
    "perplexity on held-out speeches": ("heldout_perplexity", "{:.1f}"),
    "optimizer state, MiB": ("optimizer_state_mib", "{:.1f}"),
    "optimizer ms per step, median": ("optimizer_ms_median", "{:.1f}"),
    "mean with refreshes": ("optimizer_ms_mean", "{:.1f}"),
    "tokens per second": ("tokens_per_second", "{:.0f}"),
}
"""Column of the table: key in a run's all_results.json, and format."""


def collect(folder: Path, commands: dict[str, list[str]]) -> dict:
    """Return the results of the runs in a folder, one sub-folder per optimizer."""
    runs = {name: json.loads((folder / name / "all_results.json").read_text()) for name in commands}
    return {
        "machine": machine(),
        "runs": {name: {"command": " ".join(commands[name]), **result} for name, result in runs.items()},
    }


def table(results: dict) -> str:
    """Return the comparison as Markdown."""
    rows = [
        [name, *(form.format(run[key]) for key, form in COLUMNS.values())] for name, run in results["runs"].items()
    ]
    return f"{markdown(['optimizer', *COLUMNS], rows)}\n\n{results['machine']}\n"


def plot_losses(folder: Path, optimizers: list[str]) -> None:
    """Draw training and validation loss against steps into loss.png."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, colour, marker in zip(optimizers, COLOURS, MARKERS, strict=False):
        history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        training = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        validation = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
        axes.plot(*zip(*training, strict=True), color=colour, linewidth=1, alpha=0.55, label=f"{name}, training")
        if validation:
            points = zip(*validation, strict=True)
            axes.plot(*points, color=colour, marker=marker, linewidth=2, label=f"{name}, validation")
    axes.set(xlabel="training step", ylabel="cross-entropy (nats per token)", title="Loss at the same budget")
    _finish(figure, axes, folder / "loss.png", columns=2)


def plot_overlap(run: Path) -> None:
    """Draw the overlap of consecutive subspaces, one line per type of module, into subspace_overlap.png."""
    sums: dict[tuple[str, int], list[float]] = defaultdict(list)
    for line in _lines(run / "hf_lowrank_refreshes.jsonl"):
        entry = json.loads(line)
        if "overlap" in entry:
            sums[entry["module"].split(".")[-1], entry["step"]].append(entry["overlap"])
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for module, colour, marker in zip(MODULES, COLOURS, MARKERS, strict=True):
        points = sorted((step, mean(values)) for (name, step), values in sums.items() if name == module)
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.5, label=module)
    share = _share_of_the_space(run)
    axes.axhline(share, color="grey", linestyle="--", label=f"two random subspaces: {share:.2g}")
    axes.set(
        xlabel="training step of the refresh",
        ylabel="overlap with the subspace before, ‖UᵀV‖²/r (0 to 1)",
        title="How far the subspace moves at a refresh (mean over layers)",
        ylim=(0, 1),
    )
    _finish(figure, axes, run.parent / "subspace_overlap.png", columns=4)


def _share_of_the_space(run: Path) -> float:
    """Return rank / short side, which is the mean overlap of random subspaces; hidden_size is every short side."""
    groups = json.loads((run / "hf_lowrank.json").read_text())["groups"]
    config = json.loads((run / "config.json").read_text())
    rank = next(group["rank"] for group in groups if "rank" in group)
    return rank if rank < 1 else rank / config["hidden_size"]


def _finish(figure: plt.Figure, axes: plt.Axes, file: Path, *, columns: int) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []
