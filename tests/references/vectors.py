"""Stored bases of singular vectors, or of none: GaLore, I3S and the rules of its analysis, a random subspace."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor

from references.base import Adam, aligned, dominant
from references.case import Case, Entry, vectors, without_replacement


def importance(case: Case) -> dict[str, Any]:
    """I3S Algorithm 2: r indices without replacement, weight sigma, sorted."""
    return {
        "choose": vectors(
            case, lambda S, r, number: without_replacement(S, r, case.uniform(number, len(S))).sort().values
        )
    }


def hybrid(case: Case) -> dict[str, Any]:
    """I3S Algorithm 3: the first r0, and r - r0 of the others, all alike. r0 = 0: uniform."""

    def indices(S: Tensor, r: int, number: int) -> Tensor:
        given = case.options.get("r0", 0)  # the uniform rule has no such option
        r0 = r // 2 if given is None else min(given, r)
        alike = torch.ones(len(S) - r0).double()
        drawn = without_replacement(alike, r - r0, case.uniform(number, len(alike)))
        return torch.cat([torch.arange(r0), r0 + drawn])

    return {"choose": vectors(case, indices)}


def random(case: Case) -> dict[str, Any]:
    """GoLore section 4: blind, uniform on the Stiefel manifold."""
    numbers = count()
    return {"choose": lambda G, r, old: aligned(case.stiefel(next(numbers), len(G), r), old)}


REFERENCES = {
    ("subspace", "dominant"): Entry(fields=lambda case: {"choose": dominant}),
    ("subspace", "i3s"): Entry(fields=importance),
    ("subspace", "hybrid"): Entry(fields=hybrid),
    ("subspace", "uniform"): Entry(fields=hybrid),
    ("subspace", "random"): Entry(fields=random),
    ("moments", "adam"): Entry(fields=lambda case: {"moments": Adam()}),
    ("reconstruction", "project"): Entry(),
    ("reconstruction", "fira"): Entry(
        fields=lambda case: {"form": case.options["fira_form"], "limiter": case.options["limiter"]}
    ),
}
