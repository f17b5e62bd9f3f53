"""Ordinary, refresh, worst and first step, state and transient bytes of every optimizer, interleaved in one run."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from contestants import (
    ADAMW,
    APOLLO,
    APOLLO_FLOOR,
    FIRA,
    FIRA_FLOOR,
    FLOOR,
    FLOORS,
    GALORE_TORCH,
    Contestant,
    Runner,
    Setup,
    ours,
)
from shapes import Problem, rehearsal
from tables import Section, Target
from timing import Samples, held_bytes, milliseconds, ratio, transient_bytes


STAGGERED = ("galore_dominant_adamw", "galore_i3s_adamw", "fira_i3s_adamw")


@dataclass
class Measured:
    """All numbers of one contestant."""

    contestant: Contestant
    runner: Runner
    first: float
    state: int
    steps: list[float] = field(default_factory=list)
    ordinary_peak: int | None = None
    refresh_peak: int | None = None
    seconds: float = 0.0

    def slow(self, seconds: float) -> bool:
        """Tell whether it has used up its time; what is compared with everything else has no limit."""
        limited = self.contestant.kind == "peer" or "8bit" in self.contestant.name
        return limited and self.seconds >= seconds

    def ordinary(self, gap: int) -> Samples:
        """Milliseconds of the steps that are not beside a refresh: packages count the first step as 0 or as 1."""
        return Samples([x for t, x in enumerate(self.steps, 1) if not near_refresh(t, gap)])

    def refresh(self, gap: int) -> Samples:
        """Milliseconds of the slowest of the three steps about each refresh."""
        whole = range(gap, len(self.steps), gap)
        return Samples([max(self.steps[t - 2 : t + 1]) for t in whole])

    def worst(self, gap: int) -> Samples:
        """Milliseconds of the slowest step of every interval."""
        return Samples([max(self.steps[i : i + gap]) for i in range(0, len(self.steps) - gap + 1, gap)])


def near_refresh(t: int, gap: int) -> bool:
    """Tell whether step t (the first is 0) may be a refresh by some package's way of counting."""
    return t % gap in (0, 1, gap - 1)


def measure(
    problem: Problem,
    contestants: Sequence[Contestant],
    setup: Setup,
    *,
    intervals: int,
    device: str,
    seconds: float = 60.0,
    peaks: bool = True,
) -> tuple[dict[str, Measured], list[str]]:
    """Time all contestants in turn, step by step.

    Args:
        problem: shared weights and gradients.
        contestants: who takes part.
        setup: rank and gap.
        intervals: gaps to run over, after the first step.
        device: where the problem lies.
        seconds: a peer, or one with 8-bit state, that has used so much is left out from then on.
        peaks: whether transient bytes are measured.

    Returns:
        What was measured by name, and remarks on who did not run.
    """
    found: dict[str, Measured] = {}
    remarks = []
    tiny = rehearsal(problem, device)
    for contestant in contestants:
        try:
            contestant.start(tiny, Setup(4, setup.gap)).step()  # imports and first calls are not the optimizer's time
            runner = contestant.start(problem, setup)
            first = milliseconds(runner.step, device)
            state = held_bytes([getattr(runner.optimizer, "state", {})])
            found[contestant.name] = Measured(contestant, runner, first, state)
        except Exception as error:  # whatever keeps a published package from running is a remark
            words = (str(error).splitlines() or [""])[0][:120]
            remarks.append(f"{contestant.name}: not measured ({type(error).__name__}: {words})")
    for _ in range(intervals * setup.gap + 1):
        for one in found.values():
            if not one.slow(seconds):
                start = time.perf_counter()
                one.steps.append(milliseconds(one.runner.step, device))
                one.seconds += time.perf_counter() - start
    for one in found.values():
        if peaks and not one.slow(seconds):
            _peaks(one, setup.gap, device)
        elif one.slow(seconds):
            remarks.append(f"{one.contestant.name}: stopped after {len(one.steps)} steps ({seconds:.0f} s)")
    return found, remarks


def _peaks(one: Measured, gap: int, device: str) -> None:
    """Profile two ordinary steps and the three about a refresh."""
    t = len(one.steps)
    wanted, peaks = {True: 3, False: 2}, {True: 0, False: 0}
    while any(wanted.values()):
        t += 1
        refresh = near_refresh(t, gap)
        if not wanted[refresh]:
            one.runner.step()
            continue
        wanted[refresh] -= 1
        peaks[refresh] = max(peaks[refresh], transient_bytes(one.runner.step, device))
    one.refresh_peak, one.ordinary_peak = peaks[True], peaks[False]


def section(problem: Problem, found: dict[str, Measured], remarks: list[str], setup: Setup) -> Section:
    """Return the table of one problem."""
    base = found[FLOOR].ordinary(setup.gap)
    rows: list[dict[str, Any]] = []
    for name, one in found.items():
        ordinary, floored = one.ordinary(setup.gap), one.contestant.kind == "floor"
        rows.append(
            {
                "optimizer": name,
                "ordinary ms": round(ordinary.median, 2),
                "quartiles": ordinary.spread,
                "p99": round(ordinary.p99, 2),
                "x floor": round(ratio(ordinary, base)[0], 2),
                "refresh step ms": None if floored else _rounded(one.refresh(setup.gap)),
                "worst of an interval ms": _rounded(one.worst(setup.gap)),
                "first step ms": round(one.first, 1),
                "state MiB": round(one.state / 2**20, 1),
                "peak MiB": _mebibytes(one.ordinary_peak),
                "peak of a refresh MiB": None if floored else _mebibytes(one.refresh_peak),
            }
        )
    title = f"Steps: {problem.name}, rank {setup.rank}, a refresh every {setup.gap} steps"
    return Section(title, rows, remarks)


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else round(count / 2**20, 2)


def _rounded(samples: Samples) -> float | None:
    return round(samples.median, 1) if samples.values else None


def targets(problem: Problem, found: dict[str, Measured], setup: Setup) -> list[Target]:
    """Return the targets on the ordinary step, the first one, and the transient bytes; in bf16 the bytes alone."""
    if problem.matrices[0][0].dtype != torch.float32:
        return _peak_targets(problem, found, setup)
    floor = found[FLOOR].ordinary(setup.gap)
    checked = []
    for name, limit in (
        ("galore_dominant_adamw", 1.20),
        ("galore_i3s_adamw", 1.20),
        ("fira_adamw", 1.30),
        ("fira_i3s_adamw", 1.30),
    ):
        checked.append(_over(f"ordinary step, {name} / floor", limit, found, name, floor, setup.gap))
    for name in (FIRA_FLOOR, GALORE_TORCH, FIRA, APOLLO, ADAMW):
        checked.append(_over(f"ordinary step, {name} / floor", None, found, name, floor, setup.gap))
    ours = found.get("galore_dominant_adamw")
    if ours:
        galore = ours.ordinary(setup.gap)
        for name in ("apollo_random_adamw", "apollo_mini_adamw"):
            checked.append(_over(f"{name} / galore_dominant_adamw", 0.75, found, name, galore, setup.gap))
        checked.append(_over(f"{APOLLO_FLOOR} / galore_dominant_adamw", None, found, APOLLO_FLOOR, galore, setup.gap))
    theirs, mine = found.get(GALORE_TORCH), found.get("galore_i3s_adamw")
    first = mine.first / theirs.first if theirs and mine else None
    checked.append(Target("first step, galore_i3s_adamw / galore-torch", 0.25, first, "one first step of each"))
    return checked + _peak_targets(problem, found, setup)


def _over(what: str, limit: float | None, found: dict[str, Measured], name: str, base: Samples, gap: int) -> Target:
    if name not in found:
        return Target(what, limit, None, "not in this run")
    value, spread = ratio(found[name].ordinary(gap), base)
    return Target(what, limit, round(value, 3), spread)


def _peak_targets(problem: Problem, found: dict[str, Measured], setup: Setup) -> list[Target]:
    """Transient MiB of an ordinary step: three r x n fp32 buffers, and for weights of low precision one block besides.

    Three buffers are the projected gradient, the direction and one temporary: less than the matrix itself as long as
    r is below a third of its short side. A block is at most 2^20 elements in fp32, with as many random bits.
    """
    buffers = max(3 * 4 * min(setup.rank, *w.shape) * max(w.shape) for w, _ in problem.matrices)
    dtype = str(problem.matrices[0][0].dtype).removeprefix("torch.")
    limit = (buffers + 8 * 2**20 * (dtype != "float32")) / 2**20
    return [
        Target(
            f"peak of an ordinary step, {name}, {dtype}", round(limit, 2), _mebibytes(found[name].ordinary_peak), "MiB"
        )
        for name in ("galore_i3s_adamw", "fira_adamw")
        if name in found
    ]


def release(found: dict[str, Measured]) -> None:
    """Forget the optimizers, so that the next problem has their memory."""
    found.clear()
    gc.collect()


def staggered(problem: Problem, setup: Setup, device: str) -> Section:
    """Measure the worst step of three intervals with the refreshes spread over them, beside the floor's own."""
    floor = next(one for one in FLOORS if one.name == FLOOR)
    everyone = [floor, *(ours(name, stagger=True) for name in STAGGERED), ours("galore_i3s_adamw")]
    found, remarks = measure(problem, everyone, setup, intervals=3, device=device, seconds=600.0, peaks=False)
    result = Section(f"Worst step: {problem.name}, a refresh of every matrix each {setup.gap} steps", [], remarks)
    for name, one in found.items():
        median, worst = Samples(one.steps).median, one.worst(setup.gap)
        row = {"optimizer": name, "median ms": round(median, 2), "worst of each interval ms": _listed(worst)}
        over = round(worst.median / median, 2)
        result.rows.append({**row, "median of the worst / median": over})
        if "stagger" in name:
            text = f"worst step / median step, {name}"
            result.targets.append(Target(text, 1.35, over, f"intervals: {_listed(worst)} ms"))
    result.remarks.append("the floor refreshes nothing: its own ratio is the noise of this machine")
    return result


def _listed(samples: Samples) -> str:
    return ", ".join(f"{x:.1f}" for x in samples.values)
