"""What runs cost: bytes by component, milliseconds by step."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from hf_lowrank.observe.report import style
from hf_lowrank.observe.report.drawing import Drawing
from hf_lowrank.observe.report.runs import Run
from hf_lowrank.observe.units import MIB


COMPONENTS = {
    "weights": "weights",
    "gradients": "gradients",
    "low_rank_state": "low-rank state",
    "dense_state": "dense state",
}


def bars(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Return the bytes of every component by run, and last those of AdamW on the same models."""
    ours: dict[str, dict[str, float]] = {}
    theirs: dict[str, dict[str, float]] = {}
    for run in runs:
        held = run.described.get("memory", {})
        if held.keys() >= COMPONENTS.keys():
            ours[style.label(run.name)] = {key: held[key] for key in COMPONENTS}
            adamw = {"weights": held["weights"], "gradients": held.get("adamw_gradients", held["gradients"])}
            reference = adamw | {"low_rank_state": 0, "dense_state": held.get("adamw_state", 0)}
            if reference not in theirs.values():
                theirs["AdamW" if not theirs else f"AdamW, as {style.label(run.name)}"] = reference
    return ours | theirs


def memory(runs: Sequence[Run]) -> Drawing:
    """Draw the bytes of every component as bars, with AdamW on the same model below."""
    found = bars(runs)
    names = list(found)
    largest = max((sum(bar.values()) for bar in found.values()), default=1.0)
    unit, size = ("GiB", 2**30) if largest > 2**30 else ("MiB", MIB)
    figure, (axes,) = style.canvas()
    figure.set_figheight(2.2 + 0.45 * len(names))
    for i, (key, label) in enumerate(COMPONENTS.items()):
        left = [sum(list(found[name].values())[:i]) / size for name in names]
        width = [found[name][key] / size for name in names]
        axes.barh(
            names,
            width,
            left=left,
            color=style.COLOURS[i],
            hatch=style.HATCHES[i],
            edgecolor="white",
            linewidth=0.5,
            label=label,
        )
    for j, name in enumerate(names):
        axes.text(sum(found[name].values()) / size, j, f" {sum(found[name].values()) / size:#.3g}", va="center")
    axes.set(xlabel=unit, xlim=(0, 1.12 * largest / size))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    caption = "Per process, without activations. AdamW: two moments in the type of the weights, as torch keeps them."
    style.finish(figure, [axes], columns=2, whole_steps=False)
    return Drawing("memory", "Memory by component", caption, figure if found else None)


def step_times(runs: Sequence[Run]) -> Drawing:
    """Draw the milliseconds of every step, one row per run, steps with refreshes apart from ordinary ones."""
    timed = [(i, run) for i, run in enumerate(runs) if run.steps]
    figure, (axes,) = style.canvas()
    figure.set_figheight(2.0 + 0.75 * max(1, len(timed)))
    notes = []
    for row, (i, run) in enumerate(timed):
        ordinary = [float(s["ms"]) for s in run.steps if not s.get("refreshes")]
        refreshing = [float(s["ms"]) for s in run.steps if s.get("refreshes")]
        for values, offset, how in (
            (ordinary, -0.12, {"marker": "|", "alpha": 0.45, "color": style.COLOURS[i % 8]}),
            (refreshing, 0.2, {"marker": "^", "color": style.COLOURS[i % 8], "markeredgecolor": style.INK}),
        ):
            x, _ = style.thin([(v, 0.0) for v in values])
            axes.plot(x, [row + offset] * len(x), linestyle="", **how)
        shown = [
            f"{name} {median(v):.3g} ms" for name, v in (("ordinary", ordinary), ("with refreshes", refreshing)) if v
        ]
        notes.append(f"{run.name}: median {', '.join(shown)}.")
        if ordinary:
            axes.plot([median(ordinary)] * 2, [row - 0.3, row + 0.06], color=style.INK, linewidth=2)
    axes.set(xlabel="milliseconds per step", ylim=(len(timed) - 0.4, -0.6))
    style.log_scale(axes, "x")
    axes.set_yticks(range(len(timed)), [style.label(run.name) for _, run in timed])
    axes.grid(axis="y", visible=False)
    caption = "Ticks: ordinary steps, their median a long one; triangles: steps with a refresh, the first among them. "
    title = "Step times"
    return Drawing("step_times", title, caption + " ".join(notes), figure if timed else None)
