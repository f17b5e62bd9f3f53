"""The limiter of growth: a norm may grow by one per cent from one step to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lowrank.methods.options import number
from hf_lowrank.methods.registry import Gauge
from hf_lowrank.state.slots import State


LIMITER: Any = number(1.01, above=1.0, help="largest growth of the norm from one step to the next")
LIMITED = {"limited": Gauge("share of the steps in which the limiter was active", counted=True)}


def limit_(s: State, name: str, norm: Tensor, limiter: float, eps: float, keep: Tensor | None = None) -> Tensor:
    """Return L = max(norm / (last + eps), limiter) / limiter, 1 while the last norm is 0, and store norm / L.

    Divided by L the norm grows by the factor `limiter` at most. The last norm is the slot `name`; where `keep` is
    true it stays as it is. A step in which L is above 1 is counted in the gauge `limited`.

    References:
        Fira, arXiv 2410.01623, eq. 13.
    """
    last = s[name]
    growth = (norm / (last + eps)).clamp_min_(limiter).div_(limiter)
    L = torch.where(last > 0, growth, 1.0)  # also after a norm that was not a number
    active = L > 1
    limited = norm / L
    if keep is not None:
        active, limited = active & ~keep, torch.where(keep, last, limited)
    s["limited"].add_(active)
    last.copy_(limited)
    return L
