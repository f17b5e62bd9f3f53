"""No subspace: P = I."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from references.case import Case, Entry


class Sgd:
    """W <- W - lr G."""

    def update(self, R: Tensor, h: Any) -> tuple[Tensor, float]:
        return R, 1.0

    def transport(self, how: str, C: Tensor, h: Any) -> None:
        pass


def identity(case: Case) -> dict[str, Any]:
    return {"choose": lambda G, r, old: torch.eye(len(G), dtype=torch.float64)}


REFERENCES = {
    ("subspace", "whole"): Entry(fields=identity),
    ("moments", "sgd"): Entry(fields=lambda case: {"moments": Sgd()}),
}
