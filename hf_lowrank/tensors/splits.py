"""How the axes of a tensor are split over processes, whatever the mesh: FSDP2, HSDP, tensor and expert parallel.

Legend: a mesh has one or more dimensions of processes. Along each of them a tensor is cut on one of its axes, or
copied. Where several dimensions cut one axis, the first cuts it whole and the next cuts each of its pieces: FSDP2 over
tensor parallel cuts along the second dimension of the mesh first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from typing_extensions import override


# torch 2.13 renames it
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Team:
    """The processes that this one meets along some dimensions of a mesh, itself among them.

    Attributes:
        mesh: the mesh.
        dims: the dimensions, ascending.
    """

    mesh: Any
    dims: tuple[int, ...]

    @classmethod
    def of(cls, mesh: Any) -> Team:
        """Return all processes of a mesh."""
        return cls(mesh, tuple(range(mesh.ndim)))

    @cached_property
    def ranks(self) -> list[int]:
        """Their ranks among all processes, ascending: their order in the group."""
        own = self.mesh.get_coordinate()
        here = tuple(slice(None) if d in self.dims else own[d] for d in range(self.mesh.ndim))
        return sorted(self.mesh.mesh[here].flatten().tolist())

    @cached_property
    def rank(self) -> int:
        """This process's place among them."""
        return self.ranks.index(dist.get_rank())

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.ranks)

    @property
    def group(self) -> Any:
        """Their process group; all of them ask for one that is new at the same time."""
        if len(self.dims) == 1:
            return self.mesh.get_group(self.dims[0])
        return _group(dist.group.WORLD, tuple(self.ranks))


def group_of(mesh: Any, *, share: bool = False) -> Any:
    """Return the processes of a mesh; without one all of them if they share the work, else None."""
    if mesh is None:
        return dist.group.WORLD if share else None
    return Team.of(mesh).group


@lru_cache
def _group(world: Any, ranks: tuple[int, ...]) -> Any:
    """Return the group of some processes, made once; `world` tells one initialization from the next."""
    if len(ranks) == dist.get_world_size():
        return world
    return dist.new_group(list(ranks), use_local_synchronization=True)


@dataclass(frozen=True)
class Split:
    """One axis of a tensor, of which every process of a team holds one piece.

    Attributes:
        size: length of the whole axis.
        mesh: the mesh on which the tensor lies, or None.
        order: the dimensions of the mesh that cut the axis, in the order in which they do; none where every process
            holds all of it.
    """

    size: int
    mesh: Any = None
    order: tuple[int, ...] = ()

    @property
    def split(self) -> bool:
        """Whether several processes hold pieces of it."""
        return bool(self.order)

    @cached_property
    def team(self) -> Team | None:
        """The processes that together hold the whole axis, or None if each does."""
        return Team(self.mesh, tuple(sorted(self.order))) if self.order else None

    def piece(self, rank: int) -> tuple[int, int]:
        """Return (start, length) of what a process holds; torch.chunk's lengths, the last may be short or empty."""
        start, length = 0, self.size
        for dim in self.order:
            place, lengths = _places(self.mesh)[rank][dim], chunks(length, self.mesh.size(dim))
            start, length = start + sum(lengths[:place]), lengths[place]
        return start, length

    @cached_property
    def start(self) -> int:
        """Where this process's piece starts."""
        return self.piece(dist.get_rank())[0] if self.order else 0

    @cached_property
    def length(self) -> int:
        """Length of this process's piece."""
        return self.piece(dist.get_rank())[1] if self.order else self.size

    def cut(self, other: Split) -> Split:
        """Return this axis with its pieces cut further along the dimensions that cut another."""
        return Split(self.size, self.mesh, self.order + other.order)

    def gathered(self, piece: Tensor, axis: int) -> Tensor:
        """Return the whole of a tensor that is split so along `axis`, on every process: a collective operation."""
        if self.team is None:
            return piece
        pieces = [self.piece(rank) for rank in self.team.ranks]
        width = max(length for _, length in pieces)
        mine = _padded(piece.movedim(axis, 0), (width, *piece.movedim(axis, 0).shape[1:]))
        every = mine.new_empty((len(pieces), *mine.shape))
        all_gather(every.view(-1), mine.view(-1), group=self.team.group)
        whole = mine.new_empty((self.size, *mine.shape[1:]))
        for one, (start, length) in zip(every, pieces, strict=True):
            whole[start : start + length] = one[:length]
        return whole.movedim(0, axis)


@dataclass(frozen=True)
class First(Split):
    """What the first of some processes would hold, on a mesh that there is not: for plans.

    Attributes:
        processes: how many hold a piece of the axis.
    """

    processes: int = 1

    @property
    @override
    def split(self) -> bool:
        return self.processes > 1

    @override
    def piece(self, rank: int) -> tuple[int, int]:
        return 0, chunks(self.size, self.processes)[0]

    @property
    @override
    def start(self) -> int:
        return 0

    @property
    @override
    def length(self) -> int:
        return self.piece(0)[1]

    @override
    def cut(self, other: Split) -> First:
        assert isinstance(other, First)
        return First(self.size, processes=self.processes * other.processes)


@lru_cache(maxsize=16)
def _places(mesh: Any) -> dict[int, tuple[int, ...]]:
    """Return the place of every process in a mesh, by its rank."""
    places = product(*map(range, mesh.mesh.shape))
    return dict(zip(mesh.mesh.flatten().tolist(), places, strict=True))


def _padded(piece: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a contiguous tensor of a shape that begins with a piece on every axis."""
    if piece.shape == shape:
        return piece.contiguous()
    padded = piece.new_zeros(shape)
    padded[tuple(map(slice, piece.shape))] = piece
    return padded


def gather_to(piece: Tensor, axes: Mapping[int, Split], team: Team, owner: int) -> Tensor | None:
    """Return the whole of a tensor that is split on several axes, on one process; None on the others of its team.

    Args:
        piece: what this process holds.
        axes: the axes that are split; together over the team.
        team: the processes that hold the pieces of one copy.
        owner: the place of the process in the team.
    """
    pieces = [{axis: split.piece(rank) for axis, split in axes.items()} for rank in team.ranks]
    largest = {axis: max(one[axis][1] for one in pieces) for axis in axes}
    mine = _padded(piece, tuple(largest.get(axis, size) for axis, size in enumerate(piece.shape)))
    every = [torch.empty_like(mine) for _ in pieces] if team.rank == owner else None
    dist.gather(mine, every, group=team.group, group_dst=owner)
    if every is None:
        return None
    whole = piece.new_empty([axes[axis].size if axis in axes else size for axis, size in enumerate(piece.shape)])
    for one, where in zip(every, pieces, strict=True):
        held, target = one, whole
        for axis, (start, length) in where.items():
            held, target = held.narrow(axis, 0, length), target.narrow(axis, start, length)
        target.copy_(held)
    return whole


def splits(tensor: DTensor) -> dict[int, Split]:
    """Return the axes of a tensor that are split over processes.

    Raises:
        ValueError: for a tensor of which a process holds something else than one range of every axis.
    """
    mesh, orders = tensor.device_mesh, dict[int, list[int]]()
    for dim in reversed(range(mesh.ndim)):
        placement = tensor.placements[dim]
        if placement.is_replicate():
            continue
        if (axis := getattr(placement, "dim", None)) is None:
            raise ValueError(f"a weight with placements {tuple(tensor.placements)} is a sum that was not taken yet")
        order = orders.setdefault(axis % tensor.dim(), [])
        # dimensions to the right that cut before this one does: as many as their number of pieces says
        before = [prod(mesh.size(d) for d in order[:k]) for k in range(len(order) + 1)]
        factor = getattr(placement, "split_factor", 1)
        if factor not in before:
            raise ValueError(
                f"a weight with placements {tuple(tensor.placements)} is packed (each process holds pieces of several "
                "matrices in one), which is not supported: split it otherwise, or freeze it"
            )
        order.insert(before.index(factor), dim)
    return {axis: Split(tensor.shape[axis], mesh, tuple(order)) for axis, order in orders.items()}


def team_of(tensor: Tensor) -> Team | None:
    """Return the processes that hold the pieces of one copy of a tensor, or None where each holds all of it."""
    if not isinstance(tensor, DTensor):
        return None
    dims = sorted(dim for split in splits(tensor).values() for dim in split.order)
    return Team(tensor.device_mesh, tuple(dims)) if dims else None


def sharded(tensor: Tensor, axes: Mapping[int, Split]) -> Tensor:
    """Return a process's piece of a tensor as a DTensor that is split on some axes; one that is not, as it is."""
    axes = {axis: split for axis, split in axes.items() if split.order}
    if not axes:
        return tensor
    mesh = next(iter(axes.values())).mesh
    placements: list[Any] = [Replicate()] * mesh.ndim
    for axis, split in axes.items():
        for i, dim in enumerate(split.order):
            factor = prod(mesh.size(d) for d in split.order[:i] if d > dim)
            placements[dim] = Shard(axis) if factor == 1 else _StridedShard(axis, split_factor=factor)
    shape = torch.Size([axes[axis].size if axis in axes else size for axis, size in enumerate(tensor.shape)])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shape, stride=stride)


def chunks(size: int, pieces: int) -> list[int]:
    """Return the lengths into which torch.chunk, and so FSDP2, splits an axis."""
    width = -(-size // pieces)
    return [max(0, min(width, size - i * width)) for i in range(pieces)]
