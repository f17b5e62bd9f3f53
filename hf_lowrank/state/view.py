"""Optimizer state as declared data: which tensors a part owns, in which number format they are kept, how many bytes.

A part declares slots and works on fp32 tensors; a format says which tensors are stored for a slot, and goes between
the two. The stored tensors of a parameter form one flat dict: an 8-bit `exp_avg` is `exp_avg` (codes) and
`exp_avg.absmax`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.state.formats import FORMATS, Format, sliced
from hf_lowrank.state.slots import Kind, Raw, Slot, Slots


FORMAT_VERSION = 1
"""Version of the layout of `optimizer.state_dict()`; stored in every group."""

SMALLEST_QUANTIZED = 4096
"""Tensors with fewer elements stay fp32 in the 8-bit and 4-bit formats."""


Forms = Mapping[str, Format]


def forms(slots: Slots, *, basis: str = "fp32", moments: str = "fp32") -> Forms:
    """Return the format of every slot.

    Args:
        slots: the declared state.
        basis: name of the format of `basis` slots.
        moments: name of the format of `moment` and `variance` slots.
    """
    chosen = {"basis": basis, "moment": moments, "variance": moments}
    return {name: _form(slot, slot.form or chosen.get(slot.kind, "fp32")) for name, slot in slots.items()}


def _form(slot: Slot, name: str) -> Format:
    """Return a format, or that of small tensors; bases of a stack are kept, and counted, one by one."""
    stack = slot.kind == "basis" and len(slot.shape) > 2
    numel = prod(slot.shape[1:]) if stack else slot.numel
    if name not in ("8bit", "4bit") or slot.dtype != torch.float32:
        return FORMATS[name if slot.dtype == torch.float32 else "fp32"]
    if numel < SMALLEST_QUANTIZED:
        return FORMATS["fp32"]
    return sliced(name) if stack else FORMATS[name]


def stored(slots: Slots, chosen: Forms) -> Slots:
    """Return the stored tensors of all slots."""
    return {key: kept for name, slot in slots.items() for key, kept in chosen[name].stored(name, slot).items()}


class View(Mapping[str, Tensor]):
    """One parameter's state as its parts see it: fp32 tensors by slot name.

    What is stored plainly is handed out itself; anything else is decoded once and goes back at `commit`.

    Args:
        raw: the stored tensors.
        slots: what the parts declared.
        chosen: the format of every slot.
    """

    def __init__(self, raw: Raw, slots: Slots, chosen: Forms) -> None:
        self.raw, self.slots, self.forms = raw, slots, chosen
        self._decoded: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        form = self.forms[name]
        if form is FORMATS["fp32"]:
            return self.raw[name]
        if name not in self._decoded:
            self._decoded[name] = form.decode(self.raw, name, self.slots[name])
        return self._decoded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def plain(self, *kinds: Kind) -> bool:
        """Tell whether nothing of these kinds is encoded; without kinds, nothing at all."""
        return all(self.forms[name] is FORMATS["fp32"] for name in (self.names(*kinds) if kinds else self.slots))

    def names(self, *kinds: Kind) -> list[str]:
        """Return the slots of some kinds."""
        return [name for name, slot in self.slots.items() if slot.kind in kinds]

    def commit(self, *kinds: Kind) -> None:
        """Encode what was decoded of these kinds; it is decoded anew when it is read next."""
        for name in [name for name in self._decoded if self.slots[name].kind in kinds]:
            self.forms[name].encode_(self.raw, name, self.slots[name], self._decoded.pop(name))

    def forget(self, *kinds: Kind) -> None:
        """Drop what was decoded of these kinds and not changed."""
        for name in [name for name in self._decoded if self.slots[name].kind in kinds]:
            del self._decoded[name]

    def narrow(self, start: int, length: int) -> View:
        """Return the moments of `length` elements from `start` in memory order, for rules that act on each alone."""
        names = self.names("moment", "variance")
        raw: Raw = {}
        for name in names:
            raw |= self.forms[name].narrow(self.raw, name, start, length)
        return View(raw, {name: replace(self.slots[name], shape=(length,)) for name in names}, self.forms)


def allocate(slots: Slots, chosen: Forms, weight: Tensor) -> Raw:
    """Return freshly initialised stored state for one parameter."""
    raw = {name: slot.allocate(weight) for name, slot in stored(slots, chosen).items()}
    for name, slot in slots.items():
        if slot.axes:
            chosen[name].encode_(raw, name, slot, slot.allocate(weight))
    return raw


def mismatch(declared: Mapping[str, Tensor], saved: Mapping[str, object]) -> str | None:
    """Say how a saved state differs in structure from the declared one, or None if it does not."""
    if missing := sorted(set(declared) - set(saved)):
        return f"it lacks {', '.join(missing)} (it has: {', '.join(sorted(saved)) or 'nothing'})"
    if extra := sorted(set(saved) - set(declared)):
        return f"it has {', '.join(extra)}, which this method does not keep"
    for name, fresh in declared.items():
        value = saved[name]
        if not isinstance(value, Tensor):
            return f"{name} is a {type(value).__name__}, not a tensor"
        if value.shape != fresh.shape or value.dtype != fresh.dtype:
            return f"{name} is {value.dtype} {tuple(value.shape)}, expected {fresh.dtype} {tuple(fresh.shape)}"
    return None


def nbytes(state: Mapping[str, object]) -> int:
    """Bytes of all tensors in one parameter's state that this process holds."""
    held = (v.to_local() if isinstance(v, DTensor) else v for v in state.values())
    return sum(v.numel() * v.element_size() for v in held if isinstance(v, Tensor))
