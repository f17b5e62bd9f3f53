"""What the papers say of one method beside another, tried at this size: pairs of rows at equal trials.

    python recipes/studies/claims.py                # trains what is missing, then prints the table
    python recipes/studies/claims.py --print        # the table alone
    python recipes/studies/claims.py --of_study     # claims that the runs of compare_methods.py decide; trains nothing

Models, text, search and scores are those of compare_methods.py, recorded in claims.jsonl; bases are refreshed every 25
steps. A claim "holds here" where the 95 % interval of the difference, paired by seed, is on its side of zero, it is
"the other way round here" where it is on the other, and "not decidable here" where it holds zero. Betas are the
papers' (0.9, 0.999) but where they are what is tried. Each interval is at 95 % for itself; the last column says what
is left where all claims of the table are to be right together (Holm's correction at 5 %).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from hf_lowrank import METHODS  # noqa: E402
from hf_lowrank.methods.resolve import split  # noqa: E402
from recipes.shared.common import stop  # noqa: E402
from recipes.shared.display import markdown  # noqa: E402
from recipes.studies.compare_methods import FILE as METHODS_FILE  # noqa: E402
from recipes.studies.compare_methods import (  # noqa: E402
    Record,
    Study,
    add_run_options,
    check_run_options,
    check_trials,
    only_one,
    several,
)
from recipes.studies.compare_rows import LONG_MEMORY, ROWS, Row, settled  # noqa: E402
from recipes.studies.compare_tables import chance, corrected, losses, paired, text  # noqa: E402
from recipes.studies.compare_training import SIZES  # noqa: E402


FILE = HERE / "claims.jsonl"
USUAL = ((0.9, 0.999),)
GAP = 25
"""Steps between refreshes: so that a training of 300 has twelve bases."""


def _row(method: str, betas: Sequence[tuple[float, float]] = USUAL, **options: Any) -> Row:
    """Return a row by its method and options, which are its name."""
    name = ", ".join([method, *(f"{key}={value}" for key, value in options.items())])
    own = "update_proj_gap" in METHODS[split(method)[0]].defaults  # LDAdam follows the gradient at every step
    gap = {} if own else {"update_proj_gap": GAP}
    return Row(name if tuple(betas) == USUAL else f"{name}, b2 tuned", method, {**gap, **options}, tuple(betas))


DOMINANT, I3S, FIRA = _row("galore_dominant_adamw"), _row("galore_i3s_adamw"), _row("fira_adamw")
COMPENSATED = {"moments": "adam", "reconstruction": "compensation", "scale": 0.3}


@dataclass(frozen=True)
class Claim:
    """That one row ends with a lower loss than another.

    Attributes:
        paper: who says so, by arXiv number.
        says: in words.
        first, second: the row that is to be better, and the other.
    """

    paper: str
    says: str
    first: Row
    second: Row


CLAIMS = (
    Claim("2502.05790", "I3S beats the dominant subspace, with Adam", I3S, DOMINANT),
    Claim("2502.05790", "... with Fira", _row("fira_i3s_adamw"), FIRA),
    Claim("2502.05790", "... with Adafactor", _row("galore_i3s_adafactor"), _row("galore_dominant_adafactor")),
    Claim("2502.05790", "... with Adam-mini", _row("galore_i3s_adam_mini"), _row("galore_dominant_adam_mini")),
    Claim("2502.05790", "... with 8-bit Adam", _row("galore_i3s_adamw_8bit"), _row("galore_dominant_adamw_8bit")),
    Claim("2502.05790", "leading vectors and uniform others beat I3S", _row("galore_hybrid_adamw"), I3S),
    Claim("2502.05790", "I3S beats a random subspace", I3S, _row("galore_random_adamw")),
    Claim("2502.05790", "I3S beats uniform sampling of singular vectors", I3S, _row("galore_uniform_adamw")),
    Claim("2410.01623", "Fira beats GaLore", FIRA, DOMINANT),
    Claim("2502.01586", "SubTrack beats GaLore", _row("subtrack_adamw"), DOMINANT),
    Claim("2502.01586", "moments carried into the new basis help",
          _row("galore_dominant_adamw", on_refresh="rotate_variance"), DOMINANT),
    Claim("2410.16029", "Natural GaLore beats GaLore", _row("natural_galore_adamw"), DOMINANT),
    Claim("2410.16103", "LDAdam beats GaLore", _row("ldadam"), DOMINANT),
    Claim("2410.11289", "GoLore beats GaLore", _row("golore_adamw"), DOMINANT),
    Claim("2502.07752", "compensation helps: Alice beats its own subspace without it", _row("alice_adamw"),
          _row("lowrank", subspace="alice", moments="adam", reconstruction="project", scale=0.3)),
    Claim("2502.07752", "the basis matters: Alice's with compensation beats a random one with it", _row("alice_adamw"),
          _row("lowrank", subspace="random", **COMPENSATED)),
    Claim("-", "Fira gains from its residual, not from b2: it beats GaLore whose b2 is tuned", FIRA,
          _row("galore_dominant_adamw", LONG_MEMORY)),
    Claim("-", "Alice gains from its residual, not from b2: it beats GaLore whose b2 is tuned", _row("alice_adamw"),
          _row("galore_dominant_adamw", LONG_MEMORY)),
    Claim("-", "APOLLO gains from its rule, not from b2: it beats GaLore whose b2 is tuned",
          _row("apollo_random_adamw"), _row("galore_dominant_adamw", LONG_MEMORY)),
)  # fmt: skip
"""In the order of their recording: the first rows are in most pairs."""


def _of_study(paper: str, says: str, first: str, second: str) -> Claim:
    return Claim(paper, says, ROWS[first], ROWS[second])


OF_STUDY = (
    _of_study("2410.01623", "Fira beats GaLore", "fira_adamw", "galore_dominant_adamw"),
    _of_study("2411.07837", "FRUGAL beats GaLore", "frugal_adamw", "galore_dominant_adamw"),
    _of_study("2410.16103", "LDAdam beats GaLore", "ldadam", "galore_dominant_adamw"),
    _of_study("2410.11289", "GoLore beats GaLore", "golore_adamw", "galore_dominant_adamw"),
    _of_study("2512.07112", "FOAM beats GaLore", "foam_adamw", "galore_dominant_adamw"),
    _of_study("2505.24749", "SUMO beats GaLore", "sumo", "galore_dominant_adamw"),
    _of_study("2505.24749", "SUMO's residual and carried momentum help", "sumo", "galore_dominant_muon"),
    _of_study("2502.05790", "I3S beats the dominant subspace, with Adam", "galore_i3s_adamw", "galore_dominant_adamw"),
    _of_study("2502.05790", "... with Fira", "fira_i3s_adamw", "fira_adamw"),
    _of_study("2502.07752", "compensation helps: I3S with it beats I3S", "i3s_compensation", "galore_i3s_adamw"),
    _of_study(
        "2502.07752", "the basis matters: Alice's beats I3S' with compensation", "alice_adamw", "i3s_compensation"
    ),
    _of_study("2502.07752", "Alice beats Fira", "alice_adamw", "fira_adamw"),
    _of_study("2502.01586", "SubTrack++ beats Fira, without its decompositions", "subtrack_pp_adamw", "fira_adamw"),
    _of_study("2412.05270", "APOLLO beats AdamW", "apollo_random_adamw", "full_adamw"),
    _of_study("2502.07752", "Alice beats AdamW", "alice_adamw", "full_adamw"),
    _of_study("2412.05270", "APOLLO beats Fira", "apollo_random_adamw", "fira_adamw"),
    _of_study("2502.07752", "RACS beats AdamW", "racs", "full_adamw"),
    _of_study("2502.16982", "Muon beats AdamW", "full_muon", "full_adamw"),
)
"""Between rows of compare_methods.py, at the points and on the seeds that it has recorded."""


def rows() -> tuple[Row, ...]:
    """Return every row of every claim, once."""
    return tuple({row.name: row for claim in CLAIMS for row in (claim.first, claim.second)}.values())


def verdict(difference: tuple[float, float] | None) -> str:
    """Return what an interval of first minus second says of a claim."""
    if difference is None:
        return "not tried"
    middle, half = difference
    if middle == inf:
        return "one of them diverged"
    if middle + half < 0:
        return "holds here"
    return "the other way round here" if middle - half > 0 else "not decidable here"


def table(record: Record, size: str, steps: int, claims: Sequence[Claim] = CLAIMS) -> str:
    """Return every claim with its difference and verdict, as Markdown."""
    tried = []
    for claim in claims:
        first, second = (losses(record.scores(row, size, steps)) for row in (claim.first, claim.second))
        tried.append((claim, paired(first, second), len(first.keys() & second.keys()), chance(first, second)))
    together = corrected([p for *_, p in tried])
    lines = []
    for (claim, difference, seeds, _), p in zip(tried, together, strict=True):
        shown = "-" if difference is None else text(difference, sign="+")
        trials = ", ".join(searched(record, row, size, steps) for row in (claim.first, claim.second))
        stands = "yes" if p < 0.05 else "-"
        lines.append([claim.says, claim.paper, shown, str(seeds), trials, verdict(difference), stands])
    return markdown(["claim", "arXiv", "first minus second", "seeds", "trials of both", "here", "after Holm"], lines)


def searched(record: Record, row: Row, size: str, steps: int) -> str:
    """Return how many points were tried of a row, and whether its best lies at an edge of those."""
    trials = record.trials(row, size, steps)
    return f"{len(trials)}{'' if not trials or settled(trials, row) else ' at an edge'}"


def main() -> None:
    """Train what is missing, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="where results are recorded")
    parser.add_argument("--size", default="small", choices=SIZES, help="of the model")
    parser.add_argument("--steps", type=int, help="of a training; 1024 tokens each; default: 300, of the study 1000")
    parser.add_argument("--trials", type=int, default=6, help="trials of every row")
    parser.add_argument("--most", type=int, default=12, help="trials of a row whose best stays at an edge")
    add_run_options(parser)
    parser.add_argument("--print", action="store_true", help="print the table of what is recorded, and run nothing")
    parser.add_argument("--of_study", action="store_true", help="print what compare_methods.py has recorded of others")
    args = parser.parse_args()
    steps = (1000 if args.of_study else 300) if args.steps is None else args.steps
    args.file = file = args.file or (METHODS_FILE if args.of_study else FILE)
    args.steps = steps
    check_run_options(args)
    check_trials(args)
    if not (args.print or args.of_study):
        study = Study(rows(), args.size, steps, args.trials, args.most, args.seeds)
        with only_one(file):
            several(study, Record(file), time.monotonic() + 60 * args.minutes, args.jobs)
    elif not file.exists():
        stop(f"there is nothing to print: no file {file}")
    print(table(Record(file), args.size, steps, OF_STUDY if args.of_study else CLAIMS))


if __name__ == "__main__":
    main()
