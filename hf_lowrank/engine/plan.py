"""What stays the same about a parameter as long as its options do: how it lies, and which state it has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.methods.context import Columns
from hf_lowrank.methods.resolve import Config
from hf_lowrank.state import view
from hf_lowrank.state.slots import Buffer, Buffers, Slot, Slots, counter
from hf_lowrank.state.view import Encodings
from hf_lowrank.tensors.layout import Layout, local


COUNTERS: Slots = {"step": counter(), "moment_step": counter(), "skipped": counter()}
REFRESH: Slots = {
    "refreshes": counter(),
    "refresh_at": counter(),
    # of the last refresh: overlap with the basis before, captured energy, stable rank
    "report": Slot("3", "gauge", "exact", shared=True),
}

_ATTENTION = re.compile(r"(^|\.)(q_proj|k_proj|query|key)\.weight$")


@dataclass(frozen=True)
class Plan:
    """What is known of a parameter before its first step.

    Attributes:
        layout: how a matrix lies; None for what is stepped as a dense parameter is.
        columns: what the columns of R are.
        r: the rank of a matrix; 0 for a dense parameter.
        buffers: the declared state of this process's piece.
        encodings: the number formats of those.
        whole: the declared state of the whole parameter.
    """

    layout: Layout | None
    columns: Columns
    r: int
    buffers: Buffers
    encodings: Encodings
    whole: Buffers

    @classmethod
    def of(cls, weight: Tensor, config: Config, name: str = "") -> Plan:
        """Plan for one parameter.

        Args:
            weight: the parameter.
            config: its method and options.
            name: its name in the model, "" if unknown.
        """
        return _of_matrix(weight, config, name) if config.by_matrix else _of_dense(weight, config)

    @property
    def kept(self) -> Buffers:
        """The stored tensors."""
        return view.kept(self.buffers, self.encodings)

    @property
    def nbytes(self) -> int:
        """Bytes of this process's state, counters included."""
        return sum(buffer.nbytes for buffer in self.kept.values())


def _of_matrix(weight: Tensor, config: Config, name: str) -> Plan:
    options, parts = config.options, config.parts
    layout = Layout.of(weight, options["proj_type"])
    r, columns = parts.subspace.rank(layout.m, layout.n, options["rank"]), _columns_of(layout, config, name)
    across = parts.subspace.projected.split()[-1]
    moments = {
        key: replace(slot, axes=slot.axes.replace("n", across)) for key, slot in parts.moments.slots(columns).items()
    }
    slots: Slots = {
        **parts.subspace.slots(),
        **moments,
        **parts.reconstruction.slots(),
        **{key: Slot("", "gauge", "exact") for key in config.gauges},
        **COUNTERS,
        **REFRESH,
    }
    piece = dict(zip("mn", layout.piece, strict=True))
    here, whole = {"m": layout.m, "n": layout.columns, "r": r}, {"m": layout.m, "n": layout.n, "r": r}

    def sized(key: str, slot: Slot, lengths: Mapping[str, int], stack: tuple[int, ...]) -> Buffer:
        across = "m" if slot.held and not layout.transposed else "n"
        buffer = slot.sized(lengths, stack, "" if slot.lifetime == "basis" else across)
        # moments of whole gradients lie as the weight does, with which they are read
        turned = parts.subspace.whole and layout.transposed and key in moments and slot.axes == "r n"
        return replace(buffer, turned=True) if turned else buffer

    buffers = {key: sized(key, slot, piece if slot.held else here, layout.stack) for key, slot in slots.items()}
    entire = {key: sized(key, slot, whole, layout.batch) for key, slot in slots.items()}
    formats = {"basis": options.get("basis_format", "fp32"), "moments": options["state_format"]}
    return Plan(layout, columns, r, buffers, view.encodings(entire, **formats), entire)


def _columns_of(layout: Layout, config: Config, name: str) -> Columns:
    """Return what the columns of R are; a weight is taken as (outputs, inputs)."""
    head = config.options.get("head_dim", 0)
    per_head = head and layout.n % head == 0 and _ATTENTION.search(name)
    block = (head if per_head else 1) if layout.transposed else 0
    return Columns(layout.n, block, layout.offset if layout.along == "columns" else 0)


def _of_dense(weight: Tensor, config: Config) -> Plan:
    rule, columns = config.dense_rule, _columns_of_dense(weight, config)
    slots = {**rule.slots(columns), **COUNTERS}
    if config.low_rank:  # torch takes the device of a full state dict from a tensor with axes, and SGD has none
        slots["report"] = REFRESH["report"]

    def sized(slot: Slot, shape: Sequence[int]) -> Buffer:
        if rule.elementwise and not slot.shared:  # in the tensor's own shape, whose first axis are the columns
            own = replace(slot, axes=" ".join(["n", *["r"] * (len(shape) - 1)]) if shape else "")
            return Buffer(own, tuple(shape), split="n")
        axes = slot.axes.replace("r n", "n") if columns.vector else slot.axes
        return replace(slot, axes=axes).sized({"r": prod(shape[1:]), "n": shape[0] if shape else 1}, split="n")

    buffers = {key: sized(slot, local(weight).shape) for key, slot in slots.items()}
    entire = {key: sized(slot, weight.shape) for key, slot in slots.items()}
    form = config.options["state_format" if config.low_rank else "dense_state_format"]
    encodings = view.encodings(entire, moments=form)
    return Plan(None, columns, weight.shape[-1] if config.low_rank else 0, buffers, encodings, entire)


def _columns_of_dense(weight: Tensor, config: Config) -> Columns:
    """Return what the columns of a dense tensor are, as a rule that is not elementwise sees it: its first axis."""
    tokens = config.options.get("kind") == "embedding"
    return Columns(weight.shape[0] if weight.dim() else 1, 1, vector=weight.dim() < 2, tokens=tokens)


def split_axis(weight: DTensor, plan: Plan, key: str) -> tuple[int, int] | None:
    """Return (axis, whole length) along which a stored tensor is split over processes, or None if each holds all of
    it.

    Args:
        weight: the parameter.
        plan: its plan.
        key: the name of one of `plan.kept`.
    """
    buffer, layout = plan.kept[key], plan.layout
    if buffer.slot.shared:
        return None
    if layout is None:
        axis = buffer.axis("n")
        return None if axis is None else (axis, weight.shape[0])
    if layout.along == "batch":
        return 0, layout.batch[0]
    if buffer.slot.lifetime == "basis":
        return None
    name = "m" if buffer.slot.held and layout.along == "rows" else "n"
    axis = buffer.axis(name)
    return None if axis is None else (axis, layout.m if name == "m" else layout.n)


def projected_bytes(plan: Plan, config: Config) -> int:
    """Return the bytes of this process's projected gradient in fp32, which the layerwise mode keeps until `step`."""
    layout = plan.layout
    if layout is None:
        return 0
    lengths = {"m": layout.m, "r": plan.r, "n": layout.columns}
    axes = config.parts.subspace.projected.split()
    return 4 * prod(layout.stack) * prod(int(axis) if axis.isdigit() else lengths[axis] for axis in axes)
