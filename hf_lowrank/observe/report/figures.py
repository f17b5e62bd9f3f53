"""The figures: each draws what the runs have, or is left out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from matplotlib.figure import Figure as Canvas

from hf_lowrank.observe.records import MODULE_TYPES, module_type
from hf_lowrank.observe.report import style
from hf_lowrank.observe.report.runs import Points, Run, is_number


@dataclass(frozen=True)
class Figure:
    """One figure on the page.

    Attributes:
        name: of its PNG file.
        title: what it shows.
        caption: how to read it.
        svg: the drawing.
    """

    name: str
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Drawing:
    """A figure before it is written; `canvas` is None where the runs do not have what it shows."""

    name: str
    title: str
    caption: str
    canvas: Canvas | None


def draw(runs: Sequence[Run], folder: Path, *, matrices: int) -> list[Figure]:
    """Draw all figures for which there is something, and write their PNG files."""
    with style.settings():
        drawings = [
            *_curves(runs, "loss", "Loss", "loss, nats per token", lambda loss: loss),
            *_curves(runs, "perplexity", "Perplexity", "perplexity", lambda loss: math.exp(min(loss, 700.0))),
            _gap(runs),
            *(_subspaces(run, i) for i, run in enumerate(runs, 1)),
            _captured(runs),
            _update_rank(runs),
            _spectrum(runs, matrices),
            _memory(runs),
            _step_times(runs),
        ]
        return [
            Figure(d.name, d.title, d.caption, style.save(d.canvas, d.name, folder))
            for d in drawings
            if d.canvas is not None
        ]


def _curves(runs: Sequence[Run], name: str, title: str, unit: str, convert: Callable[[float], float]) -> list[Drawing]:
    """Draw training and validation against steps, and against seconds."""
    drawings = []
    clocks = [run.seconds() for run in runs]
    spread = [run.name for run, (clock, measured) in zip(runs, clocks, strict=True) if clock and not measured]
    timeless = [run.name for run, (clock, _) in zip(runs, clocks, strict=True) if clock is None]
    for over in ("steps", "seconds"):
        figure, (axes,) = style.canvas()
        drawn = False
        for i, (run, (clock, _)) in enumerate(zip(runs, clocks, strict=True)):
            if over == "seconds" and clock is None:
                continue
            place = clock if over == "seconds" and clock is not None else float
            curves = {key: run.curve(key) for key in ("loss", "eval_loss")}
            marked = "eval_loss" if curves["eval_loss"] else "loss"
            for key in curves if name == "loss" else [marked]:
                points = [(place(step), convert(loss)) for step, loss in curves[key]]
                how = {"label": run.name} if key == marked else {"linewidth": 1.0, "alpha": 0.65, "marker": ""}
                if points:
                    axes.plot(*style.thin(points), **style.look(i) | how)
                    drawn = True
        axes.set(xlabel="training step" if over == "steps" else "seconds of training", ylabel=unit)
        if name == "perplexity":
            style.log_scale(axes)
        caption = "exp(loss), of the validation data where there are any."
        if name == "loss":
            caption = "With markers: validation; thin: training (with markers where there is no validation)."
        if over == "seconds" and spread:
            caption += f" Of {', '.join(spread)} only the whole time is known; it is spread evenly over the steps."
        if over == "seconds" and timeless:
            caption += f" The times of {', '.join(timeless)} are not known; trainer.save_state() keeps them."
        style.finish(figure, [axes], whole_steps=over == "steps")
        drawings.append(Drawing(f"{name}_{over}", f"{title} against {over}", caption, figure if drawn else None))
    return drawings


def _gap(runs: Sequence[Run]) -> Drawing:
    """Draw how far the perplexity of every run lies above that of the first."""
    figure, (axes,) = style.canvas()
    drawn = False
    key = "eval_loss" if all(run.curve("eval_loss") for run in runs) else "loss"
    base = dict(runs[0].curve(key))
    for i, run in enumerate(runs[1:], 1):
        points = [
            (step, math.exp(min(y, 700.0)) - math.exp(min(base[step], 700.0)))
            for step, y in run.curve(key)
            if step in base
        ]
        if points:
            axes.plot(*style.thin(points), **style.look(i), label=run.name)
            drawn = True
    axes.axhline(0, color=style.INK, linewidth=1)
    axes.set(xlabel="training step", ylabel="difference of perplexity")
    caption = f"Perplexity ({'validation' if key == 'eval_loss' else 'training'}) less that of {runs[0].name}, at the "
    caption += "steps that both have. Below zero: better."
    title = f"Perplexity gap to {runs[0].name}"
    return Drawing("perplexity_gap", title, caption, style.finish(figure, [axes]) if drawn else None)


def _by_type(run: Run, key: str) -> dict[str, Points]:
    """Return (step, mean over matrices) by module type, one point per refresh of the type's matrices."""
    found: dict[str, dict[float, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in run.refreshes:
        if is_number(row.get(key)):
            number = row["refresh"] if is_number(row.get("refresh")) else row["step"]
            found[module_type(str(row["module"]))][number].append((float(row["step"]), float(row[key])))
    return {
        kind: sorted((fmean(s for s, _ in some), fmean(v for _, v in some)) for some in numbers.values())
        for kind, numbers in sorted(found.items(), key=lambda item: MODULE_TYPES.index(item[0]))
    }


def _subspaces(run: Run, number: int) -> Drawing:
    """Draw one run's overlaps and captured energy by module type."""
    keys = {
        "overlap": "overlap with the one before",
        "overlap_first": "overlap with the first",
        "energy": "energy captured",
    }
    found = {key: lines for key in keys if (lines := _by_type(run, key))}
    figure, panels = style.canvas(max(1, len(found)))
    for axes, (key, lines) in zip(panels, found.items(), strict=False):
        for kind, points in lines.items():
            how = style.look(MODULE_TYPES.index(kind)) | {"linestyle": "-", "markevery": max(1, len(points) // 12)}
            axes.plot(*style.thin(points), **how, label=kind)
        axes.set(title=keys[key], ylim=(0, 1.02))
    panels[-1].set_xlabel("training step of the refresh")
    caption = (
        "Means over the layers. Overlap is ‖UᵀV‖²/r of two subspaces of dimension r: 1 for the same one, rank / short "
        "side for two random ones. Energy is the share of the gradient's squared norm inside the new subspace."
    )
    if not found:
        return Drawing("", "", "", None)
    return Drawing(f"subspaces_{number}", f"Subspaces of {run.name}", caption, style.finish(figure, panels, columns=4))


def _captured(runs: Sequence[Run]) -> Drawing:
    """Draw captured energy and stable rank, means over all matrices, with the range of the module types."""
    keys = {"energy": "energy captured", "stable_rank": "stable rank of the gradient"}
    found = {key: [_by_type(run, key) for run in runs] for key in keys}
    found = {key: values for key, values in found.items() if any(values)}
    figure, panels = style.canvas(max(1, len(found)))
    for axes, (key, values) in zip(panels, found.items(), strict=False):
        for i, (run, lines) in enumerate(zip(runs, values, strict=True)):
            length = min((len(points) for points in lines.values()), default=0)
            columns = [[points[j] for points in lines.values()] for j in range(length)]
            if columns:
                steps = [fmean(step for step, _ in column) for column in columns]
                axes.plot(steps, [fmean(v for _, v in column) for column in columns], **style.look(i), label=run.name)
                low, high = ([pick(v for _, v in column) for column in columns] for pick in (min, max))
                axes.fill_between(steps, low, high, color=style.COLOURS[i % 8], alpha=0.15, linewidth=0)
        axes.set(title=keys[key])
        axes.set_ylim(bottom=0, top=1.02 if key == "energy" else None)
    panels[-1].set_xlabel("training step of the refresh")
    caption = "Means over the types of modules; the band reaches from the lowest type to the highest."
    return Drawing("energy", "What the subspaces capture", caption, style.finish(figure, panels) if found else None)


def _update_rank(runs: Sequence[Run]) -> Drawing:
    figure, (axes,) = style.canvas()
    drawn = False
    for i, run in enumerate(runs):
        if points := run.curve("lowrank/update_rank"):
            axes.plot(*style.thin(points), **style.look(i), label=run.name)
            drawn = True
    axes.set(xlabel="training step of the checkpoint", ylabel="effective rank")
    axes.set_ylim(bottom=0)
    caption = "(Σσ²)²/Σσ⁴ of what the matrices changed by since the checkpoint before; mean over matrices, estimated."
    name, title = "update_rank", "Effective rank of the update"
    return Drawing(name, title, caption, style.finish(figure, [axes]) if drawn else None)


def _spectrum(runs: Sequence[Run], matrices: int) -> Drawing:
    """Draw the singular values of what weights changed by between the last two checkpoints."""
    figure, (axes,) = style.canvas()
    notes = []
    for i, run in enumerate(runs):
        if matrices < 1 or len(run.checkpoints) < 2:
            continue
        from hf_lowrank.observe.report.spectra import mean_spectrum, weight_change

        try:
            change = weight_change(run, matrices)
        except ValueError as error:
            notes.append(f"{run.name}: {error}.")
            continue
        if change is not None:
            (first, last), spectra = change
            x, y = mean_spectrum(list(spectra.values()))
            axes.plot(x, y, **style.look(i), label=run.name)
            notes.append(f"{run.name}: steps {first} to {last}, {len(spectra)} matrices.")
    axes.set(xlabel="i / number of singular values", ylabel="σᵢ / σ₁", yscale="log", xlim=(0, 1))
    caption = f"Singular values of the difference of weights between the last two checkpoints. {' '.join(notes)}"
    drawn = bool(axes.lines)
    title = "Spectrum of the weights' change"
    return Drawing("spectrum", title, caption, style.finish(figure, [axes], whole_steps=False) if drawn else None)


COMPONENTS = {
    "weights": "weights",
    "gradients": "gradients",
    "low_rank_state": "low-rank state",
    "dense_state": "dense state",
}


def _memory(runs: Sequence[Run]) -> Drawing:
    """Draw the bytes of every component as bars, with AdamW on the same model below."""
    bars: dict[str, dict[str, float]] = {}
    for run in runs:
        held = run.described.get("memory", {})
        if held.keys() >= COMPONENTS.keys():
            bars[run.name] = {key: held[key] for key in COMPONENTS}
            adamw = {"weights": held["weights"], "gradients": held.get("adamw_gradients", held["gradients"])}
            reference = adamw | {"low_rank_state": 0, "dense_state": held.get("adamw_state", 0)}
            if reference not in bars.values():
                bars["AdamW" if "AdamW" not in bars else f"AdamW, as {run.name}"] = reference
    names = [name for name in bars if not name.startswith("AdamW")] + [
        name for name in bars if name.startswith("AdamW")
    ]
    largest = max((sum(bar.values()) for bar in bars.values()), default=1.0)
    unit, size = ("GiB", 2**30) if largest > 2**30 else ("MiB", 2**20)
    figure, (axes,) = style.canvas()
    figure.set_figheight(2.2 + 0.45 * len(names))
    for i, (key, label) in enumerate(COMPONENTS.items()):
        left = [sum(list(bars[name].values())[:i]) / size for name in names]
        width = [bars[name][key] / size for name in names]
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
        axes.text(sum(bars[name].values()) / size, j, f" {sum(bars[name].values()) / size:#.3g}", va="center")
    axes.set(xlabel=unit, xlim=(0, 1.12 * largest / size))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    caption = "Per process, without activations. AdamW: two moments in the type of the weights, as torch keeps them."
    style.finish(figure, [axes], columns=2, whole_steps=False)
    return Drawing("memory", "Memory by component", caption, figure if bars else None)


def _step_times(runs: Sequence[Run]) -> Drawing:
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
    axes.set_yticks(range(len(timed)), [run.name for _, run in timed])
    axes.grid(axis="y", visible=False)
    caption = "Ticks: ordinary steps, their median a long one; triangles: steps with a refresh, the first among them. "
    title = "Step times"
    return Drawing("step_times", title, caption + " ".join(notes), figure if timed else None)
