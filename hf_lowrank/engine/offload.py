"""Gradients that wait in host memory between the backward pass and the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.engine.collectives import sum_together
from hf_lowrank.engine.unit import gradient_of
from hf_lowrank.tensors import kernels
from hf_lowrank.tensors.layout import local


class Offloaded:
    """Whole gradients in host memory, of which micro-batches add up, and the norms that they have.

    Sums are taken on the device, in the gradient's own type, as autograd takes them. On the CPU nothing moves: a
    gradient is taken off its parameter.
    """

    def __init__(self) -> None:
        self._held: dict[Tensor, Tensor] = {}
        self._norms: dict[Tensor, Tensor] = {}  # of what is held, on the device
        self._buffers: dict[Tensor, Tensor] = {}  # kept from one step to the next

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, weight: Tensor) -> bool:
        return weight in self._held

    def forget(self) -> None:
        """Drop all gradients."""
        self._held.clear()
        self._norms.clear()

    def take_(self, weight: Tensor) -> None:
        """Take this process's piece of a gradient off its parameter, and add what has been taken of it before."""
        piece = local(gradient_of(weight))
        if (before := self._held.get(weight)) is not None:
            piece.add_(before.to(piece.device, non_blocking=True))
        self._norms[weight] = kernels.norms([piece])[0]
        self._held[weight] = piece if piece.device.type == "cpu" else self._moved(weight, piece)
        weight.grad = None

    def _moved(self, weight: Tensor, piece: Tensor) -> Tensor:
        """Return a copy in host memory, which is pinned where that lets the copy run beside the device's work."""
        pinned = piece.device.type == "cuda"
        if weight not in self._buffers:
            self._buffers[weight] = torch.empty_like(piece, device="cpu", pin_memory=pinned)
        return self._buffers[weight].copy_(piece, non_blocking=pinned)  # read again on the stream that writes it here

    def bring_back_(self, weight: Tensor, factor: float = 1.0) -> None:
        """Give a parameter its gradient back, scaled, if one is held."""
        if weight not in self._held:
            return
        piece = self._held.pop(weight).to(local(weight).device, non_blocking=True)
        if factor != 1.0:
            piece.mul_(factor)
        if isinstance(weight, DTensor):
            shape, stride = weight.shape, weight.stride()
            piece = DTensor.from_local(
                piece, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride
            )
        weight.grad = piece

    def clipping(self, held: Sequence[tuple[Tensor, Any]], max_norm: float) -> tuple[float | None, float]:
        """Return the global norm of gradients that are held, and what brings it down to `max_norm` if it is larger.

        One that is not finite counts for nothing here: its parameter will be skipped.

        Args:
            held: the parameters, the same on all processes, and those that hold pieces of each, or None.
            max_norm: the most; 0: nothing is looked at.

        Returns:
            The norm, or None; and a factor of at most 1, as torch.nn.utils.clip_grad_norm_ has it.
        """
        if not max_norm or not held:
            return None, 1.0
        device, totals = self._norms[held[0][0]].device, []
        for pieces in dict.fromkeys(pieces for _, pieces in held):
            norms = torch.stack([self._norms[weight].to(device).float() for weight, one in held if one == pieces])
            norm = torch.linalg.vector_norm(torch.where(norms.isfinite(), norms, 0.0))
            if pieces is not None:
                norm = sum_together([norm.square()], pieces.group)[0].sqrt()
            totals.append(norm)
        total = totals[0] if len(totals) == 1 else torch.linalg.vector_norm(torch.stack(totals))
        return float(total), float(torch.clamp(max_norm / (total + 1e-6), max=1.0))
