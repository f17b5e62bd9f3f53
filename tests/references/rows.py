"""Grass (arXiv 2406.17660): P selects r rows of the gradient, with weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor

from references.base import Choose
from references.case import Case, Entry, with_replacement, without_replacement


def rows(draw: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> Choose:
    """P^T = rho B: column k of P is rho_k e_(sigma_k); sigma may hold a row twice. Goes with on_refresh="reset"."""

    def choose(G: Tensor, r: int, old: Tensor | None) -> Tensor:
        index, rho = draw(G, r)
        P = torch.zeros(G.shape[0], r, dtype=torch.float64)
        P[index, torch.arange(r)] = rho.double()
        return P

    return choose


def largest(G: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Top-r: the rows with the largest norms, ascending, rho = 1."""
    return G.norm(dim=1).topk(r).indices.sort().values, torch.ones(r, dtype=torch.float64)


def weights(q: Tensor, index: Tensor) -> Tensor:
    """Rows drawn with replacement with probabilities q: rho_k = 1 / sqrt(r q_(sigma_k)) makes E[P P^T] = I."""
    return 1 / (len(index) * q[index]).sqrt()


def by_rule(case: Case) -> dict[str, Any]:
    numbers, rule = count(), case.options["rows"]

    def draw(G: Tensor, r: int) -> tuple[Tensor, Tensor]:
        number, size = next(numbers), torch.ones(len(G)).double() if rule.startswith("uniform") else G.norm(dim=1)
        if rule == "top":
            return largest(G, r)
        if rule.endswith("_without"):
            return without_replacement(size, r, case.uniform(number, len(G))), torch.ones(r).double()
        index = with_replacement(size, r, case.uniform(number, r))
        return index, weights(size / size.sum(), index)

    return {"choose": rows(draw)}


REFERENCES = {("subspace", "rows"): Entry(fields=by_rule)}
