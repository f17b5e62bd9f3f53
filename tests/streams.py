"""Gradients with a known spectrum, and the few lines that every test runs the optimizer with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fitting import fitting
from torch import Tensor

from hf_lowrank import METHODS, LowRankOptimizer


def names_covering(*kinds: tuple[str, ...]) -> list[str]:
    """Rows of the table of which each has something new: parts of some kinds together, or an option's default.

    A new row of old parts adds nothing here; a new part is in every sweep.
    """
    seen: set[Any] = set()
    names = []
    for name, row in METHODS.items():
        has = {tuple((kind, str(getattr(row, kind))) for kind in together) for together in kinds}
        has |= {("default", key, str(value)) for key, value in row.defaults.items()} | {("free", row.free)}
        if has - seen:
            names.append(name)
        seen |= has
    return names


NAMES = sorted(METHODS)
COVERING = sorted(names_covering(("subspace", "reconstruction"), ("moments",)))
"""The rows for whatever is asked of every part: subspaces with each step that a row takes in them, and all moments."""
PLAIN = [  # Adam in a stored basis that a refresh chooses from the gradient, or draws
    name
    for name in NAMES
    if METHODS[name].subspace in ("dominant", "i3s", "hybrid", "uniform", "random")
    and METHODS[name].moments == "adam"
    and METHODS[name].reconstruction in ("project", "fira")
    and not METHODS[name].defaults
]
DEVICE = os.environ.get("HF_LOWRANK_DEVICE", "cpu")
"""Where the weights are: the references are computed on the CPU."""

WIDE, TALL, SQUARE, STACK = (6, 11), (11, 6), (7, 7), (3, 5, 9)


def orthonormal(rows: int, columns: int, gen: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=gen, dtype=torch.float64))[0]


def gradients(
    shape: Sequence[int], steps: int, *, seed: int = 0, drift: float = 0.1, decay: float = 0.7
) -> list[Tensor]:
    """A fixed stream: singular values k, k d, k d^2, ... times a varying size, both singular bases turning slowly.

    They decay as those of real gradients do, so that it matters which are taken, and neighbours are far enough apart
    for single vectors to be known to fp32 accuracy from a Gram matrix too; the bases turn by little within a few
    steps, so the sign rule across a refresh is never close to a tie.
    """
    if len(shape) == 3:
        slices = [gradients(shape[1:], steps, seed=seed + 100 * i, drift=drift, decay=decay) for i in range(shape[0])]
        return [torch.stack(group) for group in zip(*slices, strict=True)]
    gen = torch.Generator().manual_seed(seed)
    m, n = shape
    k = min(m, n)
    U, V = orthonormal(m, m, gen), orthonormal(n, n, gen)
    turn_left, turn_right = (torch.randn(d, d, generator=gen, dtype=torch.float64) for d in (m, n))
    turn_left, turn_right = turn_left - turn_left.T, turn_right - turn_right.T
    sizes = 1 + 0.6 * torch.rand(steps, generator=gen, dtype=torch.float64)
    sizes[0] = 2  # a large first residual: Fira's limiter acts later, not at every step
    sigma = k * decay ** torch.arange(k, dtype=torch.float64)
    left, right = (torch.matrix_exp(drift * a / a.shape[0]) for a in (turn_left, 3 * turn_right))
    stream = []
    for size in sizes:
        stream.append((size * U[:, :k] * sigma @ V[:, :k].T).float().to(DEVICE))
        U, V = left @ U, right @ V
    return stream


def weight(shape: Sequence[int], *, seed: int = 7, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """Small, like an initialised layer: fp32 rounding of the weights stays under 1e-6 of the displacement."""
    values = 0.02 * torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(values.to(DEVICE, dtype))


def optimizer(p: Any, method: str, *, rank: float | None = 3, lr: float = 1e-2, **options: Any) -> LowRankOptimizer:
    """One group, low-rank unless rank is None; options of the group and of the optimizer as they come."""
    common = {k: options.pop(k) for k in ("betas", "eps", "weight_decay", "seed") if k in options}
    low_rank = {} if rank is None else fitting(method, {"rank": rank, **options})
    group = {"params": [p] if isinstance(p, Tensor) else list(p), **(low_rank or options)}
    return LowRankOptimizer([group], method, lr=lr, **common)


def run(opt: torch.optim.Optimizer, p: Tensor, stream: Sequence[Tensor | None]) -> Iterator[int]:
    """Step through a stream of gradients, yielding the step's number after each."""
    for t, G in enumerate(stream):
        p.grad = None if G is None else G.to(p.dtype).clone()
        opt.step()
        yield t


def finish(opt: torch.optim.Optimizer, p: Tensor, stream: Sequence[Tensor | None]) -> Tensor:
    """Step through a whole stream and return the weight."""
    for _ in run(opt, p, stream):
        pass
    return p.detach().clone()


def displacement(a: Tensor, b: Tensor, start: Tensor) -> float:
    """||W_a - W_b|| / ||W_a - W_0||: the distance of two runs in units of how far they went."""
    a, b, start = (x.detach().cpu().double() for x in (a, b, start))
    return float((a - b).norm() / (a - start).norm())


def wide(x: Tensor, proj_type: str = "std") -> Tensor:
    """The view short side first; square ones transposed for proj_type=std and as they are for paper."""
    rows, columns = x.shape[-2:]
    return x.mT if rows > columns or (rows == columns and proj_type == "std") else x
