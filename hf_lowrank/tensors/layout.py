"""How a weight becomes a matrix seen wide: orientation, batch dimensions, and the piece that a process holds.

Legend: a weight (..., rows, columns) is seen as (..., m, n), transposed where that puts the short side first. Under
FSDP2 its first dimension is split over processes. Seen wide that splits

* `columns` (a transposed matrix): every process holds some columns of G, R and the moments; nothing travels in a step;
* `rows`: every process holds some rows of G and of the basis, so R is a sum over processes. It is scattered over
columns,
  the moments live there, and the step's coefficients are gathered again;
* `batch` (a stack of experts): every process holds some matrices whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from hf_lowrank.tensors.bases import Basis


# torch 2.13 renames these two
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

PROJ_TYPES = ("std", "paper", "reverse_std", "left", "right", "full")


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
        batch, m, n: the whole, seen wide: (*batch, m, n).
        transposed: whether that is the transpose of the weight.
        along: the axis that is split over processes, or "" for none.
        mesh: the device mesh over which it is split, or None.
    """

    batch: tuple[int, ...]
    m: int
    n: int
    transposed: bool
    along: Literal["", "columns", "rows", "batch"] = ""
    mesh: Any = None

    @classmethod
    def of(cls, weight: Tensor, proj_type: str) -> Layout:
        """Describe a weight.

        Raises:
            ValueError: for a sharding other than FSDP2's over the first dimension.
        """
        *batch, rows, columns = weight.shape
        transposed = is_transposed(rows, columns, proj_type)
        m, n = (columns, rows) if transposed else (rows, columns)
        if not isinstance(weight, DTensor):
            return cls(tuple(batch), m, n, transposed)
        check_sharding(weight)
        along: Any = "batch" if batch else "columns" if transposed else "rows"
        return cls(tuple(batch), m, n, transposed, along, weight.device_mesh)

    def divided(self, axis: int, processes: int) -> Layout:
        """Return how the first of some processes would hold it, split along an axis of the weight."""
        along: Any = "batch"
        if axis >= len(self.batch):
            along = "columns" if (axis == len(self.batch)) is self.transposed else "rows"
        return replace(self, along=along, mesh=_First(processes))

    @property
    def group(self) -> Any:
        """The processes over which it is split."""
        return self.mesh.get_group()

    @cached_property
    def lengths(self) -> list[int]:
        """Length of every process's piece of the split axis: the last may be short or empty."""
        size = {"columns": self.n, "rows": self.m, "batch": self.batch[0] if self.batch else 0}[self.along]
        return chunks(size, self.mesh.size())

    @cached_property
    def rank(self) -> int:
        """This process's place among them."""
        return self.mesh.get_local_rank() if self.along else 0

    @property
    def offset(self) -> int:
        """Where this process's piece of the split axis starts."""
        return sum(self.lengths[: self.rank]) if self.along else 0

    @property
    def columns(self) -> int:
        """Columns of R, and of the moments, that this process holds."""
        if self.along == "columns":
            return self.lengths[self.rank]
        return chunks(self.n, self.mesh.size())[self.rank] if self.along == "rows" else self.n

    @property
    def stack(self) -> tuple[int, ...]:
        """Batch dimensions of the piece that this process holds."""
        return (self.lengths[self.rank],) if self.along == "batch" else self.batch

    def wide(self, tensor: Tensor) -> Tensor:
        """Return the wide view of this process's piece of a weight or gradient."""
        piece = local(tensor)
        return piece.mT if self.transposed else piece

    @property
    def piece(self) -> tuple[int, int]:
        """(rows, columns) of this process's piece, seen wide."""
        held = self.lengths[self.rank] if self.along else 0
        return (held if self.along == "rows" else self.m, held if self.along == "columns" else self.n)

    @property
    def summed(self) -> bool:
        """Whether a sum over the columns of R is a sum over processes."""
        return self.along in ("rows", "columns")

    def scatter(self, R: Tensor) -> Tensor:
        """Sum R over processes that hold rows, and keep this process's columns of the sum."""
        if self.along != "rows":
            return R
        world, width = self.mesh.size(), chunks(self.n, self.mesh.size())[0]
        padded = torch.nn.functional.pad(R, (0, world * width - self.n))  # (k, world * width)
        pieces = padded.view(*R.shape[:-1], world, width).movedim(-2, 0).contiguous()  # (world, k, width)
        mine = torch.empty_like(pieces[0])
        _reduce_scatter(mine.view(-1), pieces.view(-1), group=self.group)
        return mine.narrow(-1, 0, self.columns).contiguous()

    def gather(self, Z: Tensor) -> Tensor:
        """Undo `scatter` for coefficients: every process gets all columns."""
        if self.along != "rows":
            return Z
        world, width = self.mesh.size(), chunks(self.n, self.mesh.size())[0]
        mine = torch.nn.functional.pad(Z, (0, width - Z.shape[-1])).contiguous()  # (k, width)
        pieces = torch.empty(world, *mine.shape, dtype=mine.dtype, device=mine.device)
        _all_gather(pieces.view(-1), mine.view(-1), group=self.group)
        return pieces.movedim(0, -2).flatten(-2).narrow(-1, 0, self.n)

    def whole(self, piece: Tensor, owner: int) -> Tensor | None:
        """Gather pieces that lie like the gradient's, all seen wide, on one process; None on the others."""
        if not self.along:
            return piece
        piece, lengths = piece.mT if self.transposed else piece, self.lengths
        padding = [0, 0] * (piece.dim() - 1) + [0, lengths[0] - piece.shape[0]]
        padded = torch.nn.functional.pad(piece, padding).contiguous()
        pieces = [torch.empty_like(padded) for _ in lengths] if self.rank == owner else None
        dist.gather(padded, pieces, group=self.group, group_dst=owner)
        if pieces is None:
            return None
        full = torch.cat([x[:length] for x, length in zip(pieces, lengths, strict=True)])
        return full.mT if self.transposed else full


@dataclass(frozen=True)
class _First:
    """In the place of a mesh: the first of some processes that there are not."""

    processes: int

    def size(self) -> int:
        return self.processes

    def get_local_rank(self) -> int:
        return 0


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
        return self.whole.rows(self.layout.offset, self.layout.piece[0])

    @override
    def project(self, G: Tensor) -> Tensor:
        """A collective operation."""
        return self.layout.scatter(self.here.project(G))

    @override
    def add_(self, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        """Z has been spread."""
        self.here.add_(W, Z, beta=beta, alpha=alpha)

    @override
    def expand(self, Z: Tensor, like: Tensor) -> Tensor:
        """Z has been spread."""
        return self.here.expand(Z, like)

    @override
    def rows(self, start: int, length: int) -> Basis:
        return self.here.rows(start, length)

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


def sharded(tensor: Tensor, mesh: Any, axis: int, size: int) -> DTensor:
    """Return a process's piece of state as a DTensor split over the mesh along `axis`, `size` long as a whole."""
    shape = list(tensor.shape)
    shape[axis] = size
    stride = [1] * len(shape)
    for i in reversed(range(len(shape) - 1)):
        stride[i] = stride[i + 1] * max(shape[i + 1], 1)
    return DTensor.from_local(
        tensor, mesh, [Shard(axis)], run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )


def check_sharding(weight: DTensor) -> None:
    """Refuse a sharding that is not FSDP2's over the first dimension.

    Raises:
        ValueError: naming what is supported.
    """
    if weight.device_mesh.ndim != 1 or tuple(weight.placements) != (Shard(0),):
        raise ValueError(
            f"a weight with placements {tuple(weight.placements)} is not supported; use fully_shard (FSDP2) over one "
            "mesh dimension, with its default sharding of the first weight dimension"
        )


def chunks(size: int, pieces: int) -> list[int]:
    """Return the lengths into which torch.chunk, and so FSDP2, splits an axis."""
    width = -(-size // pieces)
    return [max(0, min(width, size - i * width)) for i in range(pieces)]
