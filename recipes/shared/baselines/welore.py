"""WeLore: matrices whose singular values fall off become low-rank and train, the others freeze (arXiv 2407.11239)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recipes.shared.baselines.adapters import freeze_outside_
from recipes.shared.baselines.factorized import FactorizedLinear, linear_at


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


LEAST_REDUCTION = 0.4999
"""The authors' bar: a matrix that loses at most this share of its rank stays dense."""


def ranks(spectra: dict[str, Tensor], reduction: float) -> dict[str, int]:
    """Return the rank that the rule leaves to every matrix.

    With y = (sigma - min) / (max - min) of the singular values of each matrix and one threshold for all, values with y
    below it are pruned. The threshold is where the share of all that is pruned is `reduction` (the authors have a
    table of thresholds for two models, found so).

    Args:
        spectra: singular values of every matrix, (short side,).
        reduction: at least 0 and below 1.
    """
    scaled = {name: (x - x.min()) / (x.max() - x.min()).clamp_min(1e-30) for name, x in spectra.items()}
    everything = torch.cat(list(scaled.values())).sort().values
    threshold = everything[int(reduction * len(everything))]
    return {name: max(1, int((y >= threshold).sum())) for name, y in scaled.items()}


@torch.no_grad()
def welore_(model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str, seed: int) -> None:
    """Factorise what loses more than half of its rank; all else freezes, but for what `also_train` finds.

    Differs from the authors' code: biases stay, and the factors have the precision of the weights (there none, and
    bf16).

    Raises:
        ValueError: if the reduction is out of range, or no matrix loses as much.
    """
    if not 0 < args.welore_reduction < 1:
        raise ValueError(f"--welore_reduction must be above 0 and below 1, not {args.welore_reduction:g}")
    linears = {name: linear_at(model, name, "welore") for name in targets}
    spectra = {name: torch.linalg.svdvals(linear.weight.float()) for name, linear in linears.items()}
    found = {
        name: rank
        for name, rank in ranks(spectra, args.welore_reduction).items()
        if rank < (1 - LEAST_REDUCTION) * len(spectra[name])
    }
    if not found:
        raise ValueError(
            f"--welore_reduction {args.welore_reduction:g} leaves more than half of its rank to every matrix, and "
            "nothing would train: set more, or take a model that was trained (random matrices have no small values)"
        )
    for name, rank in found.items():
        model.set_submodule(name, FactorizedLinear(linears[name], rank=rank))
    freeze_outside_(model, also_train)
    for name in linears.keys() - found.keys():
        linears[name].requires_grad_(False)
