"""What processes send in a training step.

A process sends 2 (w - 1) / w of a buffer that w processes all-reduce, (w - 1) / w of one that they gather or scatter,
and the whole of one that is broadcast: collectives that go round a ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from hf_lowrank.engine.plan import Plan, projected_bytes
from hf_lowrank.engine.work import Declared
from hf_lowrank.observe.counting import Size, weight_bytes


class Split(NamedTuple):
    """A tensor's axis and the number of processes over which it is split, into pieces of equal length but the last."""

    axis: int
    processes: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends in a training step.

    Attributes:
        weights: to have the weights where they are multiplied.
        activations: to have the activations where they are.
        gradients: to add the gradients up.
        step: of an ordinary step of the optimizer.
        refresh: of new bases, divided by the steps between two.
    """

    weights: float = 0
    activations: float = 0
    gradients: float = 0
    step: float = 0
    refresh: float = 0

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.weights + self.activations + self.gradients + self.step + self.refresh


class Tokens(NamedTuple):
    """One process's micro-batch: sequences, tokens of each, and bytes of a number of an activation."""

    batch: int
    seq: int
    itemsize: int


def layers_of(net: nn.Module) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Return the parameters of each of the layers, as FSDP2 wraps them, and of all that is in none."""
    lists = [m for m in net.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    layers: list[list[Tensor]] = [list(layer.parameters()) for layer in max(lists, key=len, default=nn.ModuleList())]
    known = {id(p) for some in layers for p in some}
    return layers, [p for p in net.parameters() if id(p) not in known]


def reduced(bytes_: float, processes: int) -> float:
    """Return what one process sends to all-reduce a buffer."""
    return 2 * passed(bytes_, processes)


def passed(bytes_: float, processes: int) -> float:
    """Return what one process sends to gather or scatter a buffer that is this large as a whole."""
    return bytes_ * (processes - 1) / processes


def basis_bytes(plan: Plan) -> int:
    """Return the bytes of the whole bases of one parameter, as they travel: in fp32."""
    return sum(4 * buffer.numel for buffer in plan.buffers.values() if buffer.slot.lifetime == "basis")


def gap_of(one: Declared) -> int:
    """Return the steps between two refreshes."""
    return int(one.config.options.get("update_proj_gap", 1))


def exchanged(one: Declared, split: Split | None) -> float:
    """Return what one process sends in an ordinary step of one parameter: R is scattered, Z gathered, and the basis
    where pieces of it are kept."""
    layout = one.plan.layout
    if split is None or layout is None or split.axis < len(layout.batch):
        return 0
    bases = passed(basis_bytes(one.plan), split.processes) if one.config.options.get("shard_basis") else 0.0
    if not layout.divided(*split).rows.split:  # then R is a sum over processes
        return bases
    norms = 4 * layout.n if one.config.parts.reconstruction.by_columns and one.config.parts.needs_gradient else 0
    return bases + 2 * passed(projected_bytes(one.plan, one.config) + norms, split.processes)


def refreshed(one: Declared, split: Split | None, size: Size, copies: int = 1) -> float:
    """Return what one process sends for the refreshes of one parameter, by the step: its gradient, and the bases."""
    if split is None or not one.config.low_rank:
        return 0
    # one of the copies has the owner, and gathers
    piece, bases = weight_bytes([one.weight], size) / split.processes / copies, basis_bytes(one.plan)
    old = passed(bases, split.processes) if one.config.options.get("shard_basis") else 0.0
    return (piece + bases + old) / gap_of(one)
