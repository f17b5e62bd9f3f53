"""A Gaussian sketch that is drawn from its key and is no state: APOLLO, FLora."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.subspaces.whole import Unstored
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import random
from hf_lowrank.tensors.bases import Basis, Dense


KEPT = 4
"""Sketches that stay in memory whoever uses them: while bases change the same are looked at again and again."""


class _Gaussian(Unstored):
    """P (m, r) with entries N(0, 1/r), so that E[P P^T] = I; a new one at every refresh."""

    orthonormal: ClassVar[bool] = False
    without: ClassVar[tuple[str, ...]] = (
        "basis_format",
        "shard_basis",
    )

    @override
    def basis(self, s: State, ctx: Context) -> Basis:
        return Dense(_drawn(ctx.key[0], ctx.drawn, ctx.m, ctx.r, ctx.device))


@dataclass(frozen=True)
class Sketch(_Gaussian, key="sketch"):
    """P (m, r) with entries N(0, 1/r), so that E[P P^T] = I; a new one at every refresh.

    It is a function of (seed, number of the refresh, m, r), drawn on the weight's device: state, none. The stream is
    the same on all processes, and after a resume, but not on another type of device. Matrices of one shape of P share
    theirs, which has the right distribution for each of them, from one change of it to the next.

    References:
        APOLLO, arXiv 2412.05270, Algorithm 1.

    Differs from the authors' code: there every weight has a seed and a sketch of its own.
    """


@dataclass(frozen=True)
class MomentumSketch(_Gaussian, key="momentum_sketch"):
    """A Gaussian sketch as in `sketch`, whose next one is drawn when the last weight of an interval has been written.

    A step reads the momentum through the sketch that it was made with; only then is it carried into the new one.

    References:
        FLora, arXiv 2402.03293, section 2.4; when the next one is drawn: its code.

    Differs from the authors' code: there every weight has a seed and a sketch of its own.
    """

    late: ClassVar[bool] = True
    composable: ClassVar[bool] = False


_in_use: MutableMapping[Any, Tensor] = WeakValueDictionary()
"""Sketches that a matrix holds from step to step; those of one shape hold the same."""


@lru_cache(maxsize=KEPT)
def _drawn(*key: Any) -> Tensor:
    found = _in_use.get(key)
    if found is None:
        found = _in_use[key] = _draw(*key)
    return found


def _draw(seed: int, number: int, m: int, r: int, device: torch.device) -> Tensor:
    generator = random.generator(random.Stream.SKETCH, seed, number, m, r, device=device)
    return torch.randn(m, r, generator=generator, device=device, dtype=torch.float32).mul_(r**-0.5)
