"""What stays the same about a parameter as long as its options do: how it lies, and which state it has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.methods.context import Columns
from hf_lowrank.methods.resolve import Config
from hf_lowrank.state import view
from hf_lowrank.state.slots import Buffer, Buffers, Slot, Slots, counter
from hf_lowrank.state.view import Encodings
from hf_lowrank.tensors.layout import Layout, local
from hf_lowrank.tensors.splits import Split, chunks, splits


COUNTERS: Slots = {"step": counter(), "moment_step": counter(), "skipped": counter()}
REFRESH: Slots = {
    "refreshes": counter(),
    "refresh_at": counter(),
    "earlier": counter(),  # refreshes before the state was last dropped
    "dropped_at": counter(),  # steps before that
    # of the last refresh: overlap with the basis before, captured energy, stable rank
    "report": Slot("3", "gauge", "exact", shared=True),
}

NEXT = "next_"
"""What the name of a basis begins with that has been chosen, and is not in use yet."""


def ahead(bases: Slots) -> Slots:
    """Declare what there is of bases that are chosen some steps before they are adopted (`async_refresh`).

    `next_report` is `Refresh.choice`, `adopt_at` the step from which they are in use, 0 where none is on its way.
    """
    found = {
        NEXT + key: replace(slot, lifetime="next", axes_first=False)
        for key, slot in bases.items()
        if slot.lifetime == "basis"
    }
    return {**found, "next_report": Slot("4", "next", "exact", shared=True), "adopt_at": counter()}


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
        pieces: the axis of every basis of which this process keeps some rows alone (`shard_basis`), by its name.
    """

    layout: Layout | None
    columns: Columns
    r: int
    buffers: Buffers
    encodings: Encodings
    whole: Buffers
    pieces: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, weight: Tensor, config: Config, name: str = "", split: tuple[int, int] | None = None) -> Plan:
        """Plan for one parameter.

        Args:
            weight: the parameter.
            config: its method and options.
            name: its name in the model, "" if unknown.
            split: (axis, processes) over which it would be split, to plan for the first of them; None: as it is.
        """
        if not config.by_matrix:
            return _of_dense(weight, config, split)
        layout = Layout.of(weight, config.options["proj_type"])
        return _of_matrix(layout if split is None else layout.divided(*split), config, name)

    @property
    def kept(self) -> Buffers:
        """The stored tensors."""
        return view.kept(self.buffers, self.encodings)

    @property
    def lasting(self) -> Buffers:
        """The stored tensors that there are of a parameter which is not trained now: counters, and what is logged."""
        lasting = {*COUNTERS, *REFRESH}
        return {key: x for key, x in self.kept.items() if key in lasting or x.slot.lifetime == "gauge"}

    @property
    def nbytes(self) -> int:
        """Bytes of this process's state, counters included."""
        return sum(buffer.nbytes for buffer in self.kept.values())


def _of_matrix(layout: Layout, config: Config, name: str) -> Plan:
    options, parts = config.options, config.parts
    r, columns = parts.subspace.rank(layout.m, layout.n, options["rank"]), _columns_of(layout, config, name)
    across = parts.subspace.projected.split()[-1]
    moments = {
        key: replace(slot, axes=slot.axes.replace("n", across)) for key, slot in parts.moments.slots(columns).items()
    }
    slots: dict[str, Slot] = {}
    for some in (
        parts.subspace.slots(),
        moments,
        parts.reconstruction.slots(),
        {key: Slot("", "gauge", "exact") for key in config.gauges},
        ahead(parts.subspace.slots()) if options.get("async_refresh") else {},
        COUNTERS,
        REFRESH,
    ):
        if twice := slots.keys() & some.keys():
            raise ValueError(
                f"two parts of {config.method} both keep a tensor by the name of {', '.join(sorted(twice))}"
            )
        slots |= some
    piece = dict(zip("mn", layout.piece, strict=True))
    here, whole = ({"m": layout.m, "n": n, "r": r} for n in (layout.projected.length, layout.n))

    def sized(key: str, slot: Slot, lengths: Mapping[str, int], stack: tuple[int, ...]) -> Buffer:
        across = "m" if slot.held and not layout.transposed else "n"
        buffer = slot.sized(lengths, stack, "" if slot.of_basis else across)
        # moments of whole gradients lie as the weight does, with which they are read
        turned = parts.subspace.whole and layout.transposed and key in moments and slot.axes == "r n"
        return replace(buffer, turned=True) if turned else buffer

    buffers = {key: sized(key, slot, piece if slot.held else here, layout.stack) for key, slot in slots.items()}
    entire = {key: sized(key, slot, whole, layout.batch) for key, slot in slots.items()}
    pieces, kept = {}, layout.of_basis
    if options.get("shard_basis") and kept.split:
        for key, slot in parts.subspace.slots().items():
            if slot.lifetime == "basis" and (axis := buffers[key].axis("m")) is not None:
                part = sized(key, slot, {**here, "m": kept.length}, layout.stack)
                buffers[key], pieces[key] = replace(part, start=kept.start), axis
    formats = {"basis": options.get("basis_format", "fp32"), "moments": options["state_format"]}
    return Plan(layout, columns, r, buffers, view.encodings(entire, **formats), entire, pieces)


def _columns_of(layout: Layout, config: Config, name: str) -> Columns:
    """Return what the columns of R are; a weight is taken as (outputs, inputs)."""
    head = config.options.get("head_dim", 0)
    per_head = head and layout.n % head == 0 and _ATTENTION.search(name)
    block = (head if per_head else 1) if layout.transposed else 0
    return Columns(layout.n, block, layout.projected.start)


def _of_dense(weight: Tensor, config: Config, split: tuple[int, int] | None) -> Plan:
    rule, columns, shape = config.dense_rule, _columns_of_dense(weight, config), tuple(local(weight).shape)
    if split is not None:
        axis, processes = split
        shape = (*shape[:axis], chunks(shape[axis], processes)[0], *shape[axis + 1 :])
    slots = {**rule.slots(columns), **COUNTERS}
    if config.low_rank:  # torch takes the device of a full state dict from a tensor with axes, and SGD has none
        slots["report"] = REFRESH["report"]

    def sized(slot: Slot, shape: Sequence[int]) -> Buffer:
        if rule.elementwise and not slot.shared:  # in the tensor's own shape, whose first axis are the columns
            own = replace(slot, axes=" ".join(["n", *["r"] * (len(shape) - 1)]) if shape else "")
            return Buffer(own, tuple(shape), split="n")
        axes = slot.axes.replace("r n", "n") if columns.vector else slot.axes
        return replace(slot, axes=axes).sized({"r": prod(shape[1:]), "n": shape[0] if shape else 1}, split="n")

    buffers = {key: sized(slot, shape) for key, slot in slots.items()}
    entire = {key: sized(slot, weight.shape) for key, slot in slots.items()}
    form = config.options["state_format" if config.low_rank else "dense_state_format"]
    encodings = view.encodings(entire, moments=form)
    return Plan(None, columns, weight.shape[-1] if config.low_rank else 0, buffers, encodings, entire)


def _columns_of_dense(weight: Tensor, config: Config) -> Columns:
    """Return what the columns of a dense tensor are, as a rule that is not elementwise sees it: its first axis."""
    tokens = config.options.get("kind") == "embedding"
    return Columns(weight.shape[0] if weight.dim() else 1, 1, vector=weight.dim() < 2, tokens=tokens)


def split_axes(weight: DTensor, plan: Plan, key: str) -> dict[int, Split]:
    """Return how the axes of a stored tensor are split over processes.

    Args:
        weight: the parameter.
        plan: its plan.
        key: the name of one of `plan.kept`.
    """
    buffer, layout = plan.kept[key], plan.layout
    if buffer.slot.shared:
        return {}
    if layout is None:
        own, axis = splits(weight), buffer.axis("n")
        if axis == 0:  # it lies as the weight does
            return {i: split for i, split in own.items() if i < len(buffer.shape)}
        return {axis: own[0]} if axis is not None and 0 in own else {}
    found = {0: layout.matrices} if layout.batch else {}
    if key in plan.pieces:
        found[plan.pieces[key]] = layout.of_basis
    elif buffer.slot.lifetime != "basis":
        named = {"m": layout.rows, "n": layout.columns} if buffer.slot.held else {"n": layout.projected}
        found |= {axis: split for name, split in named.items() if (axis := buffer.axis(name)) is not None}
    return found


def projected_bytes(plan: Plan, config: Config) -> int:
    """Return the bytes of this process's projected gradient in fp32, which the layerwise mode keeps until `step`."""
    layout = plan.layout
    if layout is None:
        return 0
    lengths = {"m": layout.m, "r": plan.r, "n": layout.projected.length}
    axes = config.parts.subspace.projected.split()
    return 4 * prod(layout.stack) * prod(int(axis) if axis.isdigit() else lengths[axis] for axis in axes)
