"""What the refreshes left behind: overlaps, captured energy, and the spectrum of the weights' change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from hf_lowrank.observe.records import MODULE_TYPES, module_type
from hf_lowrank.observe.report import style
from hf_lowrank.observe.report.drawing import Drawing
from hf_lowrank.observe.report.runs import Points, Run, is_number


def by_type(run: Run, key: str) -> dict[str, Points]:
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


def of_one(run: Run, number: int) -> Drawing:
    """Draw one run's overlaps and captured energy by module type."""
    keys = {
        "overlap": "overlap with the one before",
        "overlap_first": "overlap with the first",
        "energy": "energy captured",
    }
    found = {key: lines for key in keys if (lines := by_type(run, key))}
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


def captured(runs: Sequence[Run]) -> Drawing:
    """Draw captured energy and stable rank, means over all matrices, with the range of the module types."""
    keys = {"energy": "energy captured", "stable_rank": "stable rank of the gradient"}
    found = {key: [by_type(run, key) for run in runs] for key in keys}
    found = {key: values for key, values in found.items() if any(values)}
    figure, panels = style.canvas(max(1, len(found)))
    for axes, (key, values) in zip(panels, found.items(), strict=False):
        for i, (run, lines) in enumerate(zip(runs, values, strict=True)):
            length = min((len(points) for points in lines.values()), default=0)
            columns = [[points[j] for points in lines.values()] for j in range(length)]
            if columns:
                steps = [fmean(step for step, _ in column) for column in columns]
                axes.plot(
                    steps,
                    [fmean(v for _, v in column) for column in columns],
                    **style.look(i),
                    label=style.label(run.name),
                )
                low, high = ([pick(v for _, v in column) for column in columns] for pick in (min, max))
                axes.fill_between(steps, low, high, color=style.COLOURS[i % 8], alpha=0.15, linewidth=0)
        axes.set(title=keys[key])
        axes.set_ylim(bottom=0, top=1.02 if key == "energy" else None)
    panels[-1].set_xlabel("training step of the refresh")
    caption = "Means over the types of modules; the band reaches from the lowest type to the highest."
    return Drawing("energy", "What the subspaces capture", caption, style.finish(figure, panels) if found else None)


def spectrum(runs: Sequence[Run], matrices: int) -> Drawing:
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
            axes.plot(x, y, **style.look(i), label=style.label(run.name))
            notes.append(f"{run.name}: steps {first} to {last}, {len(spectra)} matrices.")
    axes.set(xlabel="i / number of singular values", ylabel="σᵢ / σ₁", yscale="log", xlim=(0, 1))
    caption = f"Singular values of the difference of weights between the last two checkpoints. {' '.join(notes)}"
    drawn = bool(axes.lines)
    title = "Spectrum of the weights' change"
    return Drawing("spectrum", title, caption, style.finish(figure, [axes], whole_steps=False) if drawn else None)
