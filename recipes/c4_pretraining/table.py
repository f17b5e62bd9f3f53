"""A comparison as the I3S paper's Table 1, and as curves against steps, tokens and seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import MaxNLocator, ScalarFormatter  # noqa: E402

from recipes.shared.display import COLOURS  # noqa: E402


LINES = ("-", "--", ":", "-.")
FULL_RANK = "adamw"
AXES = {"step": "training step", "tokens": "tokens, padding not counted", "seconds": "seconds of training"}
DASH = "—"


def gap_reduction(*, full: float, dominant: float, i3s: float) -> float | None:
    """Return how much of the gap between the dominant subspace and full rank I3S closes; I3S paper, Table 1.

    (dominant - I3S) / (dominant - full), of perplexities. None where full rank is not the best of the three: there is
    no gap to close then, and the table has a dash.
    """
    if full >= min(dominant, i3s):
        return None
    return (dominant - i3s) / (dominant - full)


def pairs(rows: list[str]) -> list[tuple[str, str]]:
    """Return the (I3S, dominant) pairs of one family, in the order of the rows."""
    found = []
    for row in rows:
        partners = (row.replace("_i3s_", "_dominant_"), row.replace("_i3s_", "_"))
        found += [(row, partner) for partner in partners if "_i3s_" in row and partner in rows]
    return found


def markdown(results: Mapping[str, Any]) -> str:
    """Return the table, one pair of columns per model.

    Args:
        results: by title of the column, what compare.collect returns.
    """
    names = list(dict.fromkeys(row for found in results.values() for row in found["rows"]))
    paired = pairs(names)
    inside = {row for pair in paired for row in pair}
    lines = [["", *(title for found in results for title in (f"{found}: PPL", "state MiB"))]]
    lines += [_line(row, results) for row in names if row == FULL_RANK]
    for i3s, dominant in paired:
        lines += [_line(i3s, results, against=dominant), _line(dominant, results, against=i3s)]
        lines.append(["PPL gap reduction", *(text for x in results.values() for text in (_gap(x, i3s, dominant), ""))])
    lines += [_line(row, results) for row in names if row not in inside and row != FULL_RANK]
    lines.append(["r / d_model", *(t for x in results.values() for t in (f"{x['rank']}/{x['width']}", ""))])
    lines.append(["Tokens", *(t for x in results.values() for t in (count(x["tokens"]), ""))])
    lines.insert(1, ["---", *["---:"] * (2 * len(results))])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{_notes(results)}\n"


def perplexity(found: Mapping[str, Any], row: str) -> float | None:
    """Return the mean perplexity of a row over its seeds; None if it was not run."""
    return mean(found["rows"][row]["perplexities"]) if row in found["rows"] else None


def _line(row: str, results: Mapping[str, Any], against: str | None = None) -> list[str]:
    line = [row]
    for found in results.values():
        value = perplexity(found, row)
        if value is None:
            line += [DASH, DASH]
            continue
        other = perplexity(found, against) if against else None
        values = found["rows"][row]["perplexities"]
        text = f"{value:.2f}"
        if other is not None and value < other:
            text = f"**{text}**"
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        line += [text + spread, f"{found['rows'][row]['state_mib']:.1f}"]
    return line


def _gap(found: Mapping[str, Any], i3s: str, dominant: str) -> str:
    values = [perplexity(found, row) for row in (FULL_RANK, dominant, i3s)]
    if None in values:
        return DASH
    share = gap_reduction(**dict(zip(("full", "dominant", "i3s"), values, strict=True)))  # type: ignore[arg-type]
    return DASH if share is None else f"{share:.2%}"


def count(number: float | None) -> str:
    """Return a number of tokens or parameters as 1.5B, 58.1M or 920k."""
    if number is None:
        return DASH
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def _notes(results: Mapping[str, Any]) -> str:
    """Say what the numbers rest on."""
    lines = []
    for title, found in results.items():
        rows, settings = found["rows"], found["settings"]
        seeds = ", ".join(str(seed) for seed in sorted({seed for row in rows.values() for seed in row["seeds"]}))
        rates = (f"{name} {row['learning_rate']:g} / {row['matrix_learning_rate']:g}" for name, row in rows.items())
        lines += [
            f"{title}: {settings['config']} {settings['options']}".rstrip() + f"; {found['parameters']:,} parameters; "
            f"seeds {seeds} (mean ± standard deviation); perplexity on {count(found['eval_tokens'])} held-out "
            "tokens, which chose the learning rates too.",
            f"Learning rates, rest / matrices: {', '.join(rates)}.",
            f"{found['machine']}.",
        ]
    return "\n".join(lines)


def curve(run: Path) -> list[dict[str, float]]:
    """Return the validations of a run: step, tokens, seconds, perplexity."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    keys = (*AXES, "eval_perplexity")
    return [{key: entry[key] for key in keys} for entry in history if all(key in entry for key in keys)]


def plot(folder: Path, found: Mapping[str, Any]) -> None:
    """Draw perplexity against steps, tokens and seconds: perplexity_by_step.png and so on."""
    for axis, label in AXES.items():
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for i, (row, values) in enumerate(found["rows"].items()):
            points = [(entry[axis], entry["eval_perplexity"]) for entry in values["curve"]]
            if points:
                style = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)]}
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=row, **style)
        axes.set(xlabel=label, ylabel="validation perplexity", yscale="log", title=f"{found['title']}: same budget")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(ScalarFormatter())
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(folder / f"perplexity_by_{axis}.png", dpi=120)
        plt.close(figure)
