"""What a refresh costs and captures, and SubTrack's wall time beside GaLore's."""

from __future__ import annotations

import steps
import torch
from contestants import GALORE_TORCH, LR, PEERS, Setup, ours
from shapes import problem
from tables import Section, Target
from timing import CLOCKS, Samples, milliseconds, ratio
from torch import Tensor, nn
from training import real_gradients

from hf_lowrank import LowRankOptimizer


RULES = {
    "dominant": ("galore_dominant_adamw", {}),
    "I3S": ("galore_i3s_adamw", {}),
    "tracked: one warm power step": ("galore_dominant_adamw", {"refresh": "power"}),
    "randomized, two power iterations": ("galore_dominant_adamw", {"refresh": "randomized"}),
}
SVD = "full SVD (torch.linalg.svd)"
TRACKED = "tracked: one warm power step"

INTERVALS = (50, 100, 200, 500)

PAPER = (
    "SubTrack's Table 1 (RoBERTa-base on GLUE, 2500 iterations, interval 500, seconds, GaLore / SubTrack): average "
    "214.5 / 182.8 at rank 4, 213.7 / 182.4 at rank 8, 15.6 % and 15.4 % less",
    "its Table 2 (C4, 1000 iterations, interval 200, seconds, GaLore / SubTrack): 60M 514.76 / 508.74, "
    "130M 550.05 / 534.01, 350M 1489.67 / 1429.63: 1.2 %, 2.9 %, 4.0 % less",
    "its Figure 1 (60M, 2500 iterations, intervals 50 to 500): GaLore's time rises with the refreshes, SubTrack's "
    "stays nearly flat; whole trainings on an A100 there, the optimizer alone here",
)


class Refresher:
    """One matrix that is refreshed at every step by one rule."""

    def __init__(self, like: Tensor, rank: int, rule: str) -> None:
        name, options = RULES[rule]
        self.weight = nn.Parameter(torch.zeros_like(like))
        group = {"params": [self.weight], "rank": rank, "update_proj_gap": 1, **options}
        self.optimizer = LowRankOptimizer([group], name, lr=LR)

    def refresh(self, G: Tensor) -> tuple[float, float]:
        """Return the milliseconds of a refresh, and the share of the gradient's energy that the new basis holds."""
        before = self.optimizer.refresh_seconds
        self.weight.grad = G
        self.optimizer.step()
        energy = float(self.optimizer.state[self.weight]["report"][1])
        return 1e3 * (self.optimizer.refresh_seconds - before), energy


def sections(device: str, *, quick: bool) -> list[Section]:
    """Time every rule and the SVD on gradients of one real training run, interleaved."""
    width, inner, rank, repeats = (128, 352, 32, 2) if quick else (1024, 2736, 256, 3)
    gradients = real_gradients(width, inner, device, quick=quick)
    series = next(g for name, g in gradients.items() if "down_proj" in name)  # (width, inner) at several steps
    times: dict[str, Samples] = {SVD: Samples(), **{rule: Samples() for rule in RULES}}
    for _ in range(repeats):
        chains = {rule: Refresher(series[0], rank, rule) for rule in RULES}
        for i, G in enumerate(series):
            for rule, chain in chains.items():
                took, _ = chain.refresh(G)
                if i:  # the first one also allocates, and is exact for the tracked rule
                    times[rule].values.append(took)
            if i:
                call = lambda G=G: torch.linalg.svd(G, full_matrices=False)  # noqa: E731
                # by the wall clock, which is that of the optimizer's own count too
                times[SVD].values.append(milliseconds(call, device, CLOCKS["wall"]))
    result = Section(f"Refresh of {width} x {inner}, rank {rank}, on gradients of a short training run")
    for name, samples in times.items():
        row = {"rule": name, "ms": round(samples.median, 2), "quartiles": samples.spread}
        result.rows.append({**row, "of a full SVD": round(ratio(samples, times[SVD])[0], 4)})
    for rule, limit in (("dominant", 0.2), ("I3S", 0.2), (TRACKED, 0.04)):
        value, spread = ratio(times[rule], times[SVD])
        result.targets.append(Target(f"refresh, {rule} / full SVD, {width} x {inner}", limit, round(value, 4), spread))
    value, spread = ratio(times["I3S"], times["dominant"])
    result.targets.append(Target("refresh, I3S / dominant", 1.05, round(value, 3), spread))
    return [result, energies(gradients, rank)]


def energies(gradients: dict[str, list[Tensor]], rank: int) -> Section:
    """Compare the energy that each rule captures with that of the exact leading subspace, along the training run."""
    result = Section("Captured energy of real gradients (share of the squared norm)")
    shares = Samples()
    for name, series in gradients.items():
        chains = {rule: Refresher(series[0], rank, rule) for rule in RULES}
        for i, G in enumerate(series):
            row = {"matrix": name, "refresh": i, **{rule: chain.refresh(G)[1] for rule, chain in chains.items()}}
            result.rows.append(row)
            if i:
                shares.values.append(row[TRACKED] / row["dominant"])
    spread = f"median {shares.median:.4f} of {len(shares.values)} refreshes"
    text = "tracked refresh: energy / that of the exact subspace, the least"
    result.targets.append(Target(text, 0.99, round(min(shares.values), 4), spread, least=True))
    return result


def wall_time(size: str, device: str, *, quick: bool) -> Section:
    """Put the seconds of 1000 optimizer steps of SubTrack and GaLore at several intervals and two ranks side by side.

    Composed of the medians of one interleaved run: ordinary steps, and the refresh steps that the interval asks for.
    """
    result = Section(f"Seconds of 1000 optimizer steps, LLaMA-{size.upper()}, fp32", remarks=list(PAPER))
    posed = problem(size, torch.float32, device, *((1, 2000) if quick else ()))
    everyone = [ours("galore_dominant_adamw"), ours("galore_dominant_adamw", refresh="svd"), ours("subtrack_adamw")]
    everyone += [one for one in PEERS if one.name == GALORE_TORCH]
    for rank in (8, 16) if quick else (64, 128):
        setup = Setup(rank, 6 if quick else 8)
        found, remarks = steps.measure(
            posed, everyone, setup, intervals=2, device=device, seconds=2.0 if quick else 120.0, peaks=False
        )
        result.remarks += remarks
        for name, one in found.items():
            ordinary, refreshed = one.ordinary(setup.gap).median, one.refresh(setup.gap).median
            walls = {gap: ordinary + (refreshed - ordinary) / gap for gap in INTERVALS}
            cells = {f"interval {gap}": round(wall, 2) for gap, wall in walls.items()}
            result.rows.append({"optimizer": name, "rank": rank, **cells})
            limit = 1.05 if "subtrack" in name else None
            text = f"wall time at interval 50 / at 500, {name}, rank {rank}"
            spread = f"refresh step {refreshed:.0f} ms, ordinary {ordinary:.0f} ms"
            result.targets.append(Target(text, limit, round(walls[50] / walls[500], 3), spread))
        steps.release(found)
    return result
