"""Optimizer state as its parts see it: fp32 tensors by name, decoded where they are stored in fewer bits.

Reading is free. Writing is a scope: `with view.writing() as s` encodes what was decoded when it ends without an
error, and tells a part that has written a basis, which would be lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.state.formats import FORMATS, Encoding
from hf_lowrank.state.slots import Buffer, Buffers, State, Stored


SMALLEST_QUANTIZED = 4096
"""Tensors with fewer elements stay fp32 in the 8-bit and 4-bit formats."""

SHORTEST_LINE = 4
"""So do those with fewer elements to a line, whose scales would take more than their codes. Vectors are among them."""

Encodings = Mapping[str, Encoding]


def encodings(buffers: Buffers, *, basis: str = "fp32", moments: str = "fp32") -> Encodings:
    """Return the number format of every buffer.

    Args:
        buffers: the state, of the whole parameter: no format depends on how many processes there are.
        basis: name of the format of what changes at refreshes.
        moments: name of the format of what changes at every step.
    """
    chosen = {"basis": basis, "next": basis, "step": moments}
    return {name: _encoding(buffer, chosen.get(buffer.slot.lifetime, "fp32")) for name, buffer in buffers.items()}


def _encoding(buffer: Buffer, name: str) -> Encoding:
    """Return a format, or that of small tensors; the bases of a stack are counted one by one."""
    slot = buffer.slot
    name = slot.encoding or ("fp32" if slot.values == "exact" else name)
    if slot.dtype != torch.float32:
        return FORMATS["fp32"]
    if name in ("8bit", "4bit"):
        counted = buffer.shape[1:] if slot.of_basis and len(buffer.shape) > 2 else buffer.shape
        if prod(counted) < SMALLEST_QUANTIZED or buffer.sides[1] < SHORTEST_LINE:
            return FORMATS["fp32"]
    return FORMATS[name]


def kept(buffers: Buffers, chosen: Encodings) -> Buffers:
    """Return the stored tensors of all buffers."""
    return {key: one for name, buffer in buffers.items() for key, one in chosen[name].buffers(name, buffer).items()}


class View(Mapping[str, Tensor]):
    """One parameter's state as its parts see it: fp32 tensors by slot name.

    What is stored plainly is handed out itself; anything else is decoded once in a scope.

    Args:
        stored: the stored tensors.
        buffers: what the parts declared.
        chosen: the format of every buffer.
    """

    def __init__(self, stored: Stored, buffers: Buffers, chosen: Encodings) -> None:
        self.stored, self.buffers, self.encodings = stored, buffers, chosen
        self.plain = all(encoding is FORMATS["fp32"] for encoding in chosen.values())
        self._decoded: dict[str, Tensor] = {}
        self._shorter: dict[int, tuple[Buffers, Encodings, list[str]]] = {}
        self._fixed = [name for name, buffer in buffers.items() if buffer.slot.lifetime == "basis"]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._decoded:
            return self._decoded[name]
        encoding = self.encodings[name]
        if encoding is FORMATS["fp32"]:
            return self.stored[name]
        self._decoded[name] = encoding.decode(self.stored, name, self.buffers[name])
        return self._decoded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.buffers)

    def __len__(self) -> int:
        return len(self.buffers)

    @property
    def bases(self) -> list[str]:
        """Names of what changes at a refresh only."""
        return self._fixed

    @contextmanager
    def writing(self, *, bases: bool = False) -> Iterator[State]:
        """Hand out the state to be written in place: at a step, or at a refresh that may change bases as well.

        What was decoded is encoded at the end, but for bases at a step; after an error nothing is.

        Raises:
            RuntimeError: if a basis was written at a step.
        """
        fixed = () if bases else self._fixed
        if self.plain and not fixed:
            yield self.stored
            return
        before = {name: self[name]._version for name in fixed}
        try:
            yield self.stored if self.plain else self
            for name, version in before.items():
                if self[name]._version != version:
                    raise RuntimeError(f"{name} was written at a step: a basis changes at a refresh only")
            for name in self._decoded.keys() - set(fixed):
                self.encodings[name].encode_(self.stored, name, self.buffers[name], self._decoded[name])
        finally:
            self._decoded.clear()

    def with_(self, others: Mapping[str, Tensor]) -> View:
        """Return the same to be read, with other tensors in the place of some or beside them."""
        same = copy(self)
        same._decoded = {**self._decoded, **others}
        return same

    def forget(self) -> None:
        """Drop what was decoded; it is decoded anew when it is read next."""
        self._decoded.clear()

    def narrow(self, start: int, length: int) -> View:
        """Return the moments of a dense tensor at some places of its first axis, for rules that act on each alone."""
        if length not in self._shorter:
            moments = {name: buffer for name, buffer in self.buffers.items() if buffer.slot.values != "exact"}
            buffers = {name: replace(buffer, shape=(length, *buffer.shape[1:])) for name, buffer in moments.items()}
            chosen = {name: self.encodings[name] for name in moments}
            self._shorter[length] = buffers, chosen, list(kept(buffers, chosen))
        shorter, formats, keys = self._shorter[length]
        return View({key: self.stored[key].narrow(0, start, length) for key in keys}, shorter, formats)


def allocate(buffers: Buffers, chosen: Encodings, weight: Tensor) -> Stored:
    """Return freshly initialised stored state for one parameter."""
    stored = {name: buffer.allocate(weight) for name, buffer in kept(buffers, chosen).items()}
    for name, buffer in buffers.items():
        if buffer.slot.axes_first:
            chosen[name].encode_(stored, name, buffer, buffer.allocate(weight))
    return stored


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
