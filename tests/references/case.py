"""One run that a reference is to repeat, what was drawn in it, and how the references of its parts become one.

Draws are made anew from their keys; of the run itself nothing is known here but its shapes, options and key.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, make_dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from references.base import Choose, LowRank, Matrix, aligned


BASES, SKETCHES = 0, 3
"""First number of a key: what the stream is for."""


@dataclass(frozen=True)
class Case:
    """The run of one matrix.

    Attributes:
        shape: of the weight, without a stack.
        options: of its group.
        name: of the weight.
        index: of the parameter in group order.
        stack: (number of matrices,) if it is a stack of them, else ().
        place: which matrix of the stack this is.
    """

    shape: tuple[int, int]
    options: Mapping[str, Any]
    name: str = ""
    index: int = 0
    stack: tuple[int, ...] = ()
    place: int = 0

    @property
    def flip(self) -> bool:
        """Whether the columns are projected: the short side, unless proj_type says otherwise."""
        rows, columns = self.shape
        how = self.options.get("proj_type", "std")
        sides = {"paper": rows > columns, "reverse_std": rows < columns, "left": False, "right": True}
        return sides.get(how, rows >= columns)

    @property
    def m(self) -> int:
        """Length of the side that is projected."""
        return self.shape[1] if self.flip else self.shape[0]

    @property
    def rank(self) -> int:
        return min(self.options["rank"], *self.shape)

    def generator(self, number: int) -> torch.Generator:
        """Of basis `number`: keyed by the seed, the parameter and the number."""
        return generator(BASES, self.options["seed"], self.index, number)

    def uniform(self, number: int, *size: int) -> Tensor:
        draws = torch.rand(*self.stack, *size, generator=self.generator(number), dtype=torch.float64)
        return draws[self.place] if self.stack else draws

    def stiefel(self, number: int, m: int, r: int) -> Tensor:
        """Uniform on the Stiefel manifold: QR of a Gaussian, the diagonal of R positive."""
        draws = torch.randn(*self.stack, m, r, generator=self.generator(number))
        Q, R = torch.linalg.qr((draws[self.place] if self.stack else draws).double())
        return Q * R.diagonal().sign()

    def sketch(self, number: int, m: int, r: int) -> Tensor:
        """N(0, 1/r) from the key (use, seed, number of the refresh, m, r); all matrices of one shape share it."""
        key = SKETCHES, self.options["seed"], number, m, r
        return torch.randn(m, r, generator=generator(*key)).double() * r**-0.5


def generator(*key: int) -> torch.Generator:
    """The stream of a key: seeded by BLAKE2b of its numbers, 64 bits each, little-endian."""
    digest = hashlib.blake2b(b"".join(struct.pack("<q", number) for number in key), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") // 2)


def without_replacement(weights: Tensor, r: int, uniform: Tensor) -> Tensor:
    """r indices, ascending, drawn one after the other in proportion to their weights (as Gumbel top-r).

    Raises:
        AssertionError: where rounding might have drawn others; another seed of the test's gradients is needed.
    """
    keys = weights.log() - (-uniform.log()).log()
    ranked = keys.sort(descending=True)
    if 0 < r < len(keys):
        assert ranked.values[r - 1] - ranked.values[r] > 1e-4, "a draw is too close to call"
    return ranked.indices[:r].sort().values


def with_replacement(weights: Tensor, r: int, uniform: Tensor) -> Tensor:
    """r indices, ascending, by inversion of the cumulative sums; raises as `without_replacement` does."""
    edges = weights.cumsum(0) / weights.sum()
    assert (uniform[:, None] - edges[:-1]).abs().min() > 1e-5, "a draw is too close to call"
    return (uniform[:, None] >= edges[:-1]).sum(1).sort().values


def vectors(case: Case, indices: Callable[[Tensor, int, int], Tensor]) -> Choose:
    """P = U[:, indices(sigma, r, number of the refresh)] of the gradient's singular value decomposition."""
    numbers = count()

    def choose(G: Tensor, r: int, old: Tensor | None) -> Tensor:
        U, S, _ = torch.linalg.svd(G, full_matrices=False)
        return aligned(U[:, indices(S, r, next(numbers))], old)

    return choose


@dataclass(frozen=True)
class Entry:
    """The reference of one part.

    Attributes:
        loop: the class that does the step: LowRank or a child that changes one move of it, or, for parts that go with
            no others, a class of its own.
        fields: its arguments for a case.
        tolerance: how far an fp32 run may end from this, in units of the displacement, with any other parts.
    """

    loop: type[Matrix] = LowRank
    fields: Callable[[Case], Mapping[str, Any]] = lambda case: {}
    tolerance: Callable[[Case], float] = lambda case: 1e-5


def assemble(entries: Iterable[Entry], case: Case, W: Tensor, **extra: Any) -> Matrix:
    """One reference of three parts: its class is made of their classes, its arguments of their arguments."""
    o, entries = case.options, list(entries)
    shared = ("lr", "eps", "eps_place", "weight_decay", "scale", "correct_bias", "on_refresh")
    values = {key: o[key] for key in shared if key in o}
    values |= {"beta1": o["betas"][0], "beta2": o["betas"][1], "transposed": case.flip}
    values |= {"rank": o["rank"], "gap": o.get("update_proj_gap", 1)}
    for entry in entries:
        values |= entry.fields(case)
    loops = list(dict.fromkeys(entry.loop for entry in entries if entry.loop is not LowRank)) or [LowRank]
    alone = [loop for loop in loops if not issubclass(loop, LowRank)]
    loop = (alone or loops)[0] if alone or len(loops) == 1 else make_dataclass("Combined", [], bases=tuple(loops))
    names = {field.name for field in fields(loop)}
    return loop(W, **{key: value for key, value in {**values, **extra}.items() if key in names})
