"""Tensors, flags and sums that travel between processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowrank.tensors.sums import Max, Sum


T = TypeVar("T")


def replicas() -> Any:
    """Return the processes that train replicas of what is not split over a mesh, or None where there is one alone."""
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if together else None


def buckets(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Split what is to travel into lists of at most `limit` in all, or of one."""
    bucket, filled = list[T](), 0
    for item in items:
        if bucket and filled + size(item) > limit:
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += size(item)
    if bucket:
        yield bucket


def broadcast_(tensors: list[Tensor], owner: int, group: Any) -> None:
    """Send the owner's tensors to every process of the group, in place; those of one type travel together."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        some = [tensor for tensor in tensors if tensor.dtype == dtype]
        if len(some) == 1 and some[0].is_contiguous():
            dist.broadcast(some[0], group=group, group_src=owner)
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        dist.broadcast(flat, group=group, group_src=owner)
        for tensor, piece in zip(some, _pieces(flat, some), strict=True):
            tensor.copy_(piece)


def hand_over_(tensors: Sequence[Tensor], owner: int, to: int, device: torch.device) -> None:
    """Send the owner's tensors to one other process, in place there; those of one type travel together.

    Args:
        tensors: of the same shapes and types on both processes; no other one calls this.
        owner, to: the processes.
        device: from where tensors can be sent.
    """
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        some = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1).to(device) for tensor in some])
        if dist.get_rank() == owner:
            dist.send(flat, to)
            continue
        dist.recv(flat, owner)
        for tensor, piece in zip(some, _pieces(flat, some), strict=True):
            tensor.copy_(piece)


def all_true(flags: list[bool], group: Any, device: torch.device) -> list[bool]:
    """Return for every flag whether it holds on all processes, in one collective."""
    together = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(together, op=dist.ReduceOp.MIN, group=group)
    return [bool(flag) for flag in together.tolist()]


def sum_together(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Sum every tensor over the processes, in one collective."""
    return _reduced(tensors, dist.ReduceOp.SUM, group)


def mean_(tensors: Sequence[Tensor], here: Sequence[bool], group: Any) -> list[bool]:
    """Average tensors over the processes, in place; those of one type on one device in one collective.

    Args:
        tensors: this process's.
        here: whether it has something in each, beside zeros.
        group: the processes.

    Returns:
        Whether any process has something in each.
    """
    found = list(here)
    for kind in dict.fromkeys((x.device, x.dtype) for x in tensors):
        which = [i for i, x in enumerate(tensors) if (x.device, x.dtype) == kind]
        some = [tensors[i] for i in which]
        flags = torch.tensor([here[i] for i in which], device=kind[0], dtype=kind[1])
        flat = torch.cat([flags, *(x.reshape(-1) for x in some)]).div_(dist.get_world_size(group))
        dist.all_reduce(flat, group=group)
        anywhere, *means = _pieces(flat, [flags, *some])
        for x, mean in zip(some, means, strict=True):
            x.copy_(mean)
        for i, flag in zip(which, (anywhere > 0).tolist(), strict=True):
            found[i] = flag
    return found


def answers(asked: Sequence[Sum | Max], group: Any) -> list[Tensor]:
    """Answer what rules ask: all sums in one collective, all maxima in another."""
    found: list[Tensor] = [one.partial for one in asked]
    for kind, operation in ((Sum, dist.ReduceOp.SUM), (Max, dist.ReduceOp.MAX)):
        which = [i for i, one in enumerate(asked) if isinstance(one, kind)]
        if which:
            reduced = _reduced([found[i] for i in which], operation, group)
            found = [reduced[which.index(i)] if i in which else x for i, x in enumerate(found)]
    return found


def _reduced(tensors: Sequence[Tensor], operation: Any, group: Any) -> list[Tensor]:
    """Reduce every tensor over the processes, in one collective."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat, op=operation, group=group)
    return _pieces(flat, tensors)


def _pieces(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return views of the numbers of each tensor, in its shape, of all that were laid end to end."""
    pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
