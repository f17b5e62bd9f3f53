"""Number formats of the state: what is stored for an fp32 tensor, and the way there and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.state.slots import Raw, Slot, Slots


class Format(ABC):
    """A number format: what is stored for a slot, and the way there and back."""

    @abstractmethod
    def stored(self, name: str, slot: Slot) -> Slots:
        """Declare the stored tensors."""

    @abstractmethod
    def decode(self, raw: Raw, name: str, slot: Slot) -> Tensor:
        """Return the slot's fp32 tensor."""

    @abstractmethod
    def encode_(self, raw: Raw, name: str, slot: Slot, value: Tensor) -> None:
        """Store an fp32 tensor."""

    @abstractmethod
    def narrow(self, raw: Raw, name: str, start: int, length: int) -> Raw:
        """Return views of what is stored of `length` elements from `start` (a multiple of 256) in memory order."""


class Plain(Format):
    """Stored as declared: the tensor that a part writes is the one that is kept."""

    def stored(self, name: str, slot: Slot) -> Slots:
        """See `Format.stored`."""
        return {name: slot}

    def decode(self, raw: Raw, name: str, slot: Slot) -> Tensor:
        """See `Format.decode`."""
        return raw[name]

    def encode_(self, raw: Raw, name: str, slot: Slot, value: Tensor) -> None:
        """See `Format.encode_`."""

    def narrow(self, raw: Raw, name: str, start: int, length: int) -> Raw:
        """See `Format.narrow`."""
        return {name: raw[name].view(-1).narrow(0, start, length)}


class BFloat16(Plain):
    """bf16, rounded to nearest: for bases, which are not accumulated."""

    def stored(self, name: str, slot: Slot) -> Slots:
        """See `Format.stored`."""
        return {name: replace(slot, dtype=torch.bfloat16)}

    def decode(self, raw: Raw, name: str, slot: Slot) -> Tensor:
        """See `Format.decode`."""
        return raw[name].float()

    def encode_(self, raw: Raw, name: str, slot: Slot, value: Tensor) -> None:
        """See `Format.encode_`."""
        raw[name].copy_(value)


class EightBit(Format):
    """bitsandbytes' block-wise dynamic 8-bit: one code per element, one absmax per 256 elements in memory order.

    References:
        8-bit optimizers via block-wise quantization, arXiv 2110.02861.
    """

    block = 256

    def stored(self, name: str, slot: Slot) -> Slots:
        """See `Format.stored`."""
        codes = Slot(slot.shape, slot.kind, dtype=torch.uint8)
        return {name: codes, f"{name}.absmax": Slot((-(-slot.numel // self.block),), "exact")}

    def decode(self, raw: Raw, name: str, slot: Slot) -> Tensor:
        """See `Format.decode`."""
        functional = _bitsandbytes()
        code = _dynamic_code(slot.kind != "variance", raw[name].device)
        absmax = raw[f"{name}.absmax"]
        value: Tensor = functional.dequantize_blockwise(raw[name], absmax=absmax, code=code, blocksize=self.block)
        return value.view(slot.shape)

    def encode_(self, raw: Raw, name: str, slot: Slot, value: Tensor) -> None:
        """See `Format.encode_`."""
        functional = _bitsandbytes()
        code = _dynamic_code(slot.kind != "variance", value.device)
        codes, quantized = functional.quantize_blockwise(value.contiguous(), code=code, blocksize=self.block)
        if slot.kind == "variance":  # code 0 is zero, which would be divided by
            codes.clamp_(min=1)
        raw[name].copy_(codes.view(slot.shape))
        raw[f"{name}.absmax"].copy_(quantized.absmax)

    def narrow(self, raw: Raw, name: str, start: int, length: int) -> Raw:
        """See `Format.narrow`."""
        return {
            name: raw[name].view(-1).narrow(0, start, length),
            f"{name}.absmax": raw[f"{name}.absmax"].narrow(0, start // self.block, -(-length // self.block)),
        }


class FourBit(Format):
    """Block-wise linear 4-bit, two codes to a byte, one absmax per 128 elements in memory order.

    Signed values take the 15 levels -7/7 .. 7/7, which hold zero exactly and do not collapse on a block of one sign. A
    second moment takes 1/16 .. 16/16: zero is left out, since it would be divided by.

    References:
        Memory-efficient optimizers with 4-bit states, arXiv 2309.01507 (the second moment without a zero point).
    """

    block = 128

    def stored(self, name: str, slot: Slot) -> Slots:
        """See `Format.stored`."""
        packed = Slot((-(-slot.numel // 2),), slot.kind, dtype=torch.uint8)
        return {name: packed, f"{name}.absmax": Slot((-(-slot.numel // self.block),), "exact")}

    def decode(self, raw: Raw, name: str, slot: Slot) -> Tensor:
        """See `Format.decode`."""
        packed = raw[name]
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten().float()
        levels = (codes + 1) / 16 if slot.kind == "variance" else (codes - 7) / 7
        scales = raw[f"{name}.absmax"].repeat_interleave(self.block)[: codes.numel()]
        return (levels * scales)[: slot.numel].view(slot.shape)

    def encode_(self, raw: Raw, name: str, slot: Slot, value: Tensor) -> None:
        """See `Format.encode_`."""
        blocks = raw[f"{name}.absmax"].numel()
        flat = torch.zeros(blocks * self.block, device=value.device)
        flat[: slot.numel] = value.reshape(-1)
        rows = flat.view(blocks, self.block)
        absmax = rows.abs().amax(1)
        ratio = rows / torch.where(absmax > 0, absmax, 1.0).unsqueeze(1)
        codes = (ratio * 16).round().sub(1).clamp_(0, 15) if slot.kind == "variance" else (ratio * 7).round().add(7)
        pairs = codes.to(torch.uint8).view(-1, 2)
        raw[name].copy_((pairs[:, 0] | pairs[:, 1] << 4)[: raw[name].numel()])
        raw[f"{name}.absmax"].copy_(absmax)

    def narrow(self, raw: Raw, name: str, start: int, length: int) -> Raw:
        """See `Format.narrow`."""
        return {
            name: raw[name].narrow(0, start // 2, -(-length // 2)),
            f"{name}.absmax": raw[f"{name}.absmax"].narrow(0, start // self.block, -(-length // self.block)),
        }


class Sliced(Format):
    """Another format for every matrix of a stack (its first axis) by itself, so that a stack can be split.

    Args:
        inner: the format of one matrix.
    """

    def __init__(self, inner: Format) -> None:
        self.inner = inner

    def stored(self, name: str, slot: Slot) -> Slots:
        """See `Format.stored`."""
        one = self.inner.stored(name, replace(slot, shape=slot.shape[1:]))
        return {key: replace(kept, shape=(slot.shape[0], *kept.shape)) for key, kept in one.items()}

    def decode(self, raw: Raw, name: str, slot: Slot) -> Tensor:
        """See `Format.decode`."""
        one = replace(slot, shape=slot.shape[1:])
        slices = [self.inner.decode(self._slice(raw, name, slot, i), name, one) for i in range(slot.shape[0])]
        return torch.stack(slices) if slices else torch.zeros(slot.shape, device=raw[name].device)

    def encode_(self, raw: Raw, name: str, slot: Slot, value: Tensor) -> None:
        """See `Format.encode_`."""
        for i in range(slot.shape[0]):
            self.inner.encode_(self._slice(raw, name, slot, i), name, replace(slot, shape=slot.shape[1:]), value[i])

    def narrow(self, raw: Raw, name: str, start: int, length: int) -> Raw:
        """See `Format.narrow`; bases are not narrowed."""
        raise NotImplementedError

    def _slice(self, raw: Raw, name: str, slot: Slot, i: int) -> Raw:
        return {key: raw[key][i] for key in self.stored(name, slot)}


FORMATS: dict[str, Format] = {"fp32": Plain(), "bf16": BFloat16(), "8bit": EightBit(), "4bit": FourBit()}


@lru_cache
def sliced(form: str) -> Format:
    """Return a format that keeps every matrix of a stack by itself."""
    return Sliced(FORMATS[form])


@lru_cache
def _dynamic_code(signed: bool, device: torch.device) -> Tensor:
    """Return bitsandbytes' table of 256 dynamic codes; one per device serves all tensors."""
    code: Tensor = _bitsandbytes().create_dynamic_map(signed=signed)
    return code.to(device)


def _bitsandbytes() -> Any:
    """Import the kernels where they are used.

    Raises:
        ValueError: if bitsandbytes is not installed.
    """
    try:
        from bitsandbytes import functional
    except ImportError:
        raise ValueError("8-bit states need bitsandbytes: pip install bitsandbytes") from None
    return functional
