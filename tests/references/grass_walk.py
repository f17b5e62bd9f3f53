"""GrassWalk (arXiv 2510.01878): a step along a random geodesic, whose largest principal angle is given."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor

from references.base import aligned, dominant
from references.case import Case, Entry


def walking(case: Case) -> dict[str, Any]:
    numbers = count()

    def choose(G: Tensor, r: int, old: Tensor | None) -> Tensor:
        number = next(numbers)
        if old is None:
            return dominant(G, r, None)
        draws = torch.randn(*case.stack, *old.shape, generator=case.generator(number))
        X = (draws[case.place] if case.stack else draws).double()
        U, sigma, Vh = torch.linalg.svd(X - old @ (old.T @ X), full_matrices=False)
        if old.shape[0] == old.shape[1]:
            return old
        theta = case.options["angle"] * sigma / sigma[0]
        return aligned((old @ Vh.T * theta.cos() + U * theta.sin()) @ Vh, old)

    return {"choose": choose}


REFERENCES = {("subspace", "grass_walk"): Entry(fields=walking)}
