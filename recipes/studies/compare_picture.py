"""The figure of compare_methods.py: what every row costs in loss, beside what it keeps.

    python recipes/studies/compare_picture.py                     # the small model and the long runs, as README has it
    python recipes/studies/compare_picture.py large:1200 --picture larger.png

Nothing is run. The numbers that are drawn lie in the picture as text, so that a picture that is older than the record
can be told (`drawn_in`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import matplotlib
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.shared.common import require_writable, stop  # noqa: E402
from recipes.shared.display import COLOURS, MARKERS  # noqa: E402
from recipes.shared.lines import require_file  # noqa: E402
from recipes.studies.compare_methods import FILE, Record, study_named  # noqa: E402
from recipes.studies.compare_rows import BASELINE, ROWS  # noqa: E402
from recipes.studies.compare_tables import Result, paired, results, text  # noqa: E402


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402


PICTURE = Path(__file__).resolve().parents[2] / "docs" / "pictures" / "loss_and_state.png"
STUDIES = ("small:1000", "narrow:5152")
MOST = 3
"""Studies in one picture: more would not be told apart in a line of 0.26 inches."""


@dataclass(frozen=True)
class Series:
    """The rows of a study beside AdamW.

    Attributes:
        name: what was run, in words.
        differences: by row, the mean of the loss minus AdamW's in nats per token and half of its 95 % interval.
        bytes: by row, of state per weight of a matrix.
    """

    name: str
    differences: dict[str, tuple[float, float]]
    bytes: dict[str, float]


def series(record: Record, size: str, steps: int) -> Series | None:
    """Return what is recorded at a size and length, the lowest loss first; rows with one seed or none have no interval
    and are left out.
    """
    found = results(record, [*ROWS.values()], size, steps)
    baseline = next((result for result in found if result.row.name == BASELINE), None)
    if baseline is None:
        return None
    run = next(iter(baseline.runs.values()))
    tokens = steps * 1024 / run["parameters"]
    differences = {result.row.name: _beside(result, baseline) for result in found}
    sizes = {result.row.name: result.middle("matrix_bytes") for result in found}
    return Series(
        f"LLaMA with {run['parameters'] / 1e6:.2f} M parameters, {tokens:.1f} tokens for each",
        {name: difference for name, difference in differences.items() if difference},
        sizes,
    )


def _beside(result: Result, baseline: Result) -> tuple[float, float] | None:
    if result is baseline:
        return 0.0, 0.0
    difference = paired(result.losses, baseline.losses)
    return difference if difference and difference[1] < inf else None


def draw(studies: Sequence[Series], file: Path) -> None:
    """Draw into a PNG file."""
    figure = drawn(studies)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120, metadata={"Description": described(studies)})
    plt.close(figure)


def drawn(studies: Sequence[Series]) -> Figure:
    """Return the figure: the studies in the order of the first one's rows, and the rows' state beside them."""
    rows = list(dict.fromkeys(name for study in studies for name in study.differences))
    sizes = {name: next(study.bytes[name] for study in studies if name in study.bytes) for name in rows}
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, width_ratios=(3, 1), figsize=(9, 1.4 + 0.26 * len(rows)), layout="constrained"
    )
    for i, study in enumerate(studies):
        offset = 0.3 * (i - (len(studies) - 1) / 2)
        _draw_differences(left, study, rows, offset, colour=COLOURS[i], marker=MARKERS[i])
    left.axvline(0, color="#000000", linewidth=1)
    left.set(xlabel=f"held-out loss minus that of {BASELINE}\nnats per token, mean and 95 % interval")
    left.margins(y=0.02)
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=len(studies), frameon=False)
    right.barh(range(len(rows)), [*sizes.values()], height=0.5, color="#999999")
    for place, size in enumerate(sizes.values()):
        right.text(size + 0.1, place, f"{size:.2f}", va="center", fontsize=8)
    right.set(xlabel="bytes of state\nper weight", xlim=(0, 1.2 * max(sizes.values())))
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_differences(
    axes: Axes, study: Series, rows: Sequence[str], offset: float, *, colour: str, marker: str
) -> None:
    middles, halves = zip(*study.differences.values(), strict=True)
    places = [rows.index(name) + offset for name in study.differences]
    axes.errorbar(middles, places, xerr=halves, fmt=marker, markersize=5, capsize=2.5, color=colour, label=study.name)


def described(studies: Sequence[Series]) -> str:
    """Return the numbers that are drawn as text, a line per row and study."""
    lines = []
    for study in studies:
        lines.append(study.name)
        for name, difference in study.differences.items():
            lines.append(f"{name}, {study.bytes[name]:.2f} bytes: {text(difference, sign='+')}")
    return "\n".join(lines)


def drawn_in(file: Path) -> str:
    """Return the numbers that a picture was drawn from."""
    with Image.open(file) as picture:
        return str(picture.info["Description"])


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="SIZE:STEPS", default=STUDIES, help=f"up to {MOST}")
    parser.add_argument("--file", type=Path, default=FILE, help="where results are recorded")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the figure goes")
    args = parser.parse_args()
    names = list(dict.fromkeys(args.studies))
    if len(names) > MOST:
        stop(f"at most {MOST} studies go into one picture, not {len(names)}")
    if args.picture.suffix != ".png" or args.picture.is_dir():
        stop(f"--picture must be a PNG file such as picture.png, not {args.picture}")
    require_file(args.file)
    require_writable(args.picture.parent)
    record, found = Record(args.file), []
    for name in names:
        one = series(record, *study_named(name, "a study"))
        if one is None:
            stop(f"there is nothing to draw: no score of {BASELINE} at {name} is recorded")
        found.append(one)
    draw(found, args.picture)
    print(described(found))


if __name__ == "__main__":
    main()
