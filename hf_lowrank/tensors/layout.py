"""How a weight becomes a matrix seen wide: orientation, batch dimensions, and the piece that a process holds.

Legend: a weight (..., rows, columns) is seen as (..., m, n), transposed where that puts the short side first. Any of
its axes may be split over processes (tensors.splits): FSDP2 and column-wise tensor parallel split the first, row-wise
the second, both together one or two, expert parallel the stack. Of the axes seen wide

* `columns`: every process holds some columns of G, R and the moments; nothing travels in a step;
* `rows`: every process holds some rows of G and of the basis, so R is a sum over those that hold other rows. It is
  scattered over its columns, the moments live there, and the step's coefficients are gathered again;
* `matrices` (a stack of experts): every process holds some matrices whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from hf_lowrank.tensors.bases import Basis
from hf_lowrank.tensors.splits import First, Split, Team, all_gather, gather_to, splits


# torch 2.13 renames it
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def is_transposed(rows: int, columns: int, proj_type: str) -> bool:
    """Tell whether the wide view of a (rows, columns) weight is its transpose.

    `std` puts the short side first and sends square weights right (transposed), as the code of GaLore and of those
    that follow it does; `paper` sends them left, as the papers and LDAdam's code do; `reverse_std` puts the long side
    first; `left` and `right` do not look at the shape; `full` projects both sides.
    """
    return {
        "std": rows >= columns,
        "full": rows >= columns,
        "paper": rows > columns,
        "reverse_std": rows < columns,
        "left": False,
        "right": True,
    }[proj_type]


def clamp_rank(rank: float, m: int, n: int) -> int:
    """Return r for an (m, n) matrix: `rank` itself or, below 1, that fraction of the short side; in 1 .. min(m, n)."""
    short = min(m, n)
    return min(short, int(rank) if rank >= 1 else max(1, round(rank * short)))


def local(tensor: Tensor) -> Tensor:
    """Return the piece that this process holds (of a tensor that is not sharded: itself)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Layout:
    """How one weight lies: its wide shape as a whole, and the piece of it that this process holds.

    Attributes:
        batch: lengths of the batch dimensions of the whole.
        transposed: whether the wide view is the transpose of the weight.
        matrices: how the stack is split over processes.
        rows: how the m rows of the wide view are.
        columns: how its n columns are.
    """

    batch: tuple[int, ...]
    transposed: bool
    matrices: Split
    rows: Split
    columns: Split

    @classmethod
    def of(cls, weight: Tensor, proj_type: str) -> Layout:
        """Describe a weight.

        Raises:
            ValueError: for a sharding that is not supported.
        """
        mesh, cut = (weight.device_mesh, splits(weight)) if isinstance(weight, DTensor) else (None, {})
        axes = [cut.get(axis, Split(size, mesh)) for axis, size in enumerate(weight.shape)]
        batch, (rows, columns) = tuple(weight.shape[:-2]), axes[-2:]
        transposed = is_transposed(rows.size, columns.size, proj_type)
        if transposed:
            rows, columns = columns, rows
        return cls(batch, transposed, axes[0] if batch else Split(1, mesh), rows, columns)

    def divided(self, axis: int, processes: int) -> Layout:
        """Return how the first of some processes would hold it, split along an axis of the weight."""
        order = ("columns", "rows") if self.transposed else ("rows", "columns")
        cut = "matrices" if axis < len(self.batch) else order[axis - len(self.batch)]
        axes = {
            name: First(getattr(self, name).size, processes=processes if name == cut else 1)
            for name in ("matrices", "rows", "columns")
        }
        return Layout(self.batch, self.transposed, **axes)

    @property
    def m(self) -> int:
        """Rows of the whole."""
        return self.rows.size

    @property
    def n(self) -> int:
        """Columns of the whole."""
        return self.columns.size

    @property
    def mesh(self) -> Any:
        """The device mesh on which the weight lies, or None."""
        return self.rows.mesh

    @cached_property
    def projected(self) -> Split:
        """How the columns of R and of the moments are split: as the weight's, and each piece again where rows are."""
        return self.columns.cut(self.rows)

    @cached_property
    def of_basis(self) -> Split:
        """How the rows of a basis are split where pieces of it are kept: over all who hold pieces of the matrix."""
        return self.rows.cut(self.columns)

    @cached_property
    def team(self) -> Team | None:
        """The processes that hold the pieces of one copy, or None where each holds all of it."""
        dims = sorted((*self.matrices.order, *self.projected.order))
        return Team(self.mesh, tuple(dims)) if dims else None

    @property
    def stack(self) -> tuple[int, ...]:
        """Batch dimensions of the piece that this process holds."""
        return (self.matrices.length, *self.batch[1:]) if self.batch else ()

    @property
    def piece(self) -> tuple[int, int]:
        """(rows, columns) of this process's piece, seen wide."""
        return self.rows.length, self.columns.length

    @cached_property
    def over_gradient(self) -> dict[str, Team | None]:
        """Who holds other pieces of the gradient, by the axis that a rule sums over."""
        return {"columns": self.columns.team, "rows": self.rows.team}

    @cached_property
    def over_projected(self) -> dict[str, Team | None]:
        """Who holds other pieces of R, by the axis that a rule sums over."""
        return {"columns": self.projected.team}

    @cached_property
    def _scattered(self) -> list[tuple[int, int]]:
        """(start, length) of what each process that holds rows gets of the columns that are held."""
        assert self.rows.team is not None
        pieces = (self.projected.piece(rank) for rank in self.rows.team.ranks)
        return [(start - self.columns.start, length) for start, length in pieces]

    def scatter(self, R: Tensor) -> Tensor:
        """Sum R over processes that hold rows, and keep this process's columns of the sum."""
        if self.rows.team is None:
            return R
        pieces = R.new_zeros(self.rows.team.size, *R.shape[:-1], max(length for _, length in self._scattered))
        for piece, (start, length) in zip(pieces, self._scattered, strict=True):
            piece.narrow(-1, 0, length).copy_(R.narrow(-1, start, length))
        mine = torch.empty_like(pieces[0])
        _reduce_scatter(mine.view(-1), pieces.view(-1), group=self.rows.team.group)
        return mine.narrow(-1, 0, self.projected.length).contiguous()

    def gather(self, Z: Tensor) -> Tensor:
        """Undo `scatter` for coefficients: every process gets all columns that it holds of the weight."""
        if self.rows.team is None:
            return Z
        width = max(length for _, length in self._scattered)
        mine = torch.nn.functional.pad(Z, (0, width - Z.shape[-1])).contiguous()
        pieces = mine.new_empty(self.rows.team.size, *mine.shape)
        all_gather(pieces.view(-1), mine.view(-1), group=self.rows.team.group)
        whole = Z.new_empty(*Z.shape[:-1], self.columns.length)
        for piece, (start, length) in zip(pieces, self._scattered, strict=True):
            whole.narrow(-1, start, length).copy_(piece.narrow(-1, 0, length))
        return whole

    def whole(self, piece: Tensor, owner: int) -> Tensor | None:
        """Gather pieces that lie like the gradient's, seen wide, on one process of the mesh; None on the others."""
        if self.team is None:
            return piece
        rank = Team.of(self.mesh).ranks[owner]
        if rank not in self.team.ranks:  # it has a copy of its own
            return None
        rows, columns = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        axes = {piece.dim() - 2: rows, piece.dim() - 1: columns, **({0: self.matrices} if self.batch else {})}
        # as the weight lies, so that what is computed of it does not depend on the mesh
        full = gather_to(piece.mT if self.transposed else piece, axes, self.team, self.team.ranks.index(rank))
        return full.mT if self.transposed and full is not None else full


@dataclass(frozen=True)
class RowsOf(Basis):
    """A basis whose matrix is split over its rows: R is a sum over processes, and lies in pieces of columns.

    Attributes:
        whole: the basis, for all rows.
        layout: the piece of them that this process holds.
    """

    whole: Basis
    layout: Layout

    @cached_property
    def here(self) -> Basis:
        """The basis for the rows of this process's piece."""
        return self.whole.rows(self.layout.rows.start, self.layout.rows.length)

    @override
    def project(self, G: Tensor) -> Tensor:
        """A collective operation."""
        return self.layout.scatter(self.here.project(G))

    @override
    def add_(self, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        """Z has been spread."""
        self.here.add_(W, Z, beta=beta, alpha=alpha)

    @override
    def factors(self, Z: Tensor, W: Tensor) -> tuple[Basis, Tensor]:
        """Z has been spread."""
        return self.here.factors(Z, W)

    @override
    def expand(self, Z: Tensor, like: Tensor) -> Tensor:
        """Z has been spread."""
        return self.here.expand(Z, like)

    @override
    def rows(self, start: int, length: int) -> Basis:
        return self.here.rows(start, length)

    @override
    def witness(self, R: Tensor) -> Tensor:
        return self.whole.witness(R)

    @override
    def gram(self) -> Tensor:
        return self.whole.gram()

    @override
    def changes(self, old: Basis) -> list[Tensor]:
        return self.whole.changes(old.whole if isinstance(old, RowsOf) else old)

    @override
    def spread(self, Z: Tensor | None, d: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """At most one collective."""
        if Z is None or d is None:
            return tuple(None if x is None else self.layout.gather(x) for x in (Z, d))  # type: ignore[return-value]
        both = self.layout.gather(torch.cat([Z, d.unsqueeze(-2)], -2))
        return both[..., :-1, :], both[..., -1, :]

    @override
    def columns(self, x: Tensor) -> Tensor:
        return self.layout.scatter(x)
