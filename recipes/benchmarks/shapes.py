"""The parameters of a LLaMA with gradients, shared by all optimizers of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_lowrank.hf.models import LLAMA, VOCABULARY


@dataclass(frozen=True)
class Problem:
    """Weights and random gradients.

    Attributes:
        name: what it is, for people.
        matrices, dense: (weight, gradient) of what is projected, and of everything else.
    """

    name: str
    matrices: list[tuple[Tensor, Tensor]]
    dense: list[tuple[Tensor, Tensor]]

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return new parameters (projected, dense) on the same memory, so that many optimizers fit beside each other.

        What the numbers are does not matter for the time that a step takes.
        """
        return [_parameter(*pair) for pair in self.matrices], [_parameter(*pair) for pair in self.dense]


def _parameter(weight: Tensor, grad: Tensor) -> nn.Parameter:
    p = nn.Parameter(weight)
    p.grad = grad
    return p


def shapes(
    size: str, layers: int | None = None, vocabulary: int = VOCABULARY
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return the shapes of the projected matrices and of the dense parameters.

    Args:
        size: a key of LLAMA.
        layers: layers to keep, the vocabulary cut in proportion; None for all.
        vocabulary: tokens of the whole model.
    """
    hidden, intermediate, _, all_layers = LLAMA[size]
    kept = min(layers or all_layers, all_layers)
    block = [(hidden, hidden)] * 4 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
    return block * kept, [(vocabulary * kept // all_layers, hidden)] * 2 + [(hidden,)] * (2 * kept + 1)


def rehearsal(like: Problem, device: str) -> Problem:
    """Return a tiny problem of the same type, for what happens once in a process."""
    gen, dtype = torch.Generator().manual_seed(0), like.matrices[0][0].dtype

    def pair() -> tuple[Tensor, Tensor]:
        weight, grad = torch.randn(2, 64, 96, generator=gen)
        return weight.to(device, dtype), grad.to(device, dtype)

    return Problem("rehearsal", [pair()], [pair()])


def problem(
    size: str, dtype: torch.dtype, device: str, layers: int | None = None, vocabulary: int = VOCABULARY
) -> Problem:
    """Return a problem of these shapes."""
    gen = torch.Generator().manual_seed(0)

    def pair(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        weight, grad = (0.02 * torch.randn(shape, generator=gen), 1e-3 * torch.randn(shape, generator=gen))
        return weight.to(device, dtype), grad.to(device, dtype)

    matrices, dense = shapes(size, layers, vocabulary)
    whole = LLAMA[size][3]
    part = f", {layers} of {whole} layers, vocabulary in proportion" if layers and layers < whole else ""
    part += f", vocabulary {vocabulary}" * (vocabulary != VOCABULARY)
    name = f"LLaMA-{size.upper()}{part}, {str(dtype).removeprefix('torch.')}"
    return Problem(name, [pair(shape) for shape in matrices], [pair(shape) for shape in dense])
