"""Number formats of the state: what is stored for an fp32 tensor, and the way there and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.state.slots import Buffer, Buffers, Slot, Stored


class Encoding(ABC):
    """A number format: what is stored for a buffer, and the way there and back."""

    @abstractmethod
    def buffers(self, name: str, buffer: Buffer) -> Buffers:
        """Declare the stored tensors."""

    @abstractmethod
    def decode(self, stored: Stored, name: str, buffer: Buffer) -> Tensor:
        """Return the buffer's fp32 tensor."""

    @abstractmethod
    def encode_(self, stored: Stored, name: str, buffer: Buffer, value: Tensor) -> None:
        """Store an fp32 tensor."""

    @abstractmethod
    def narrow(self, stored: Stored, name: str, start: int, length: int) -> Stored:
        """Return views of what is stored of `length` elements from `start` (a multiple of 256) in memory order."""


class Plain(Encoding):
    """Stored as declared: the tensor that a part writes is the one that is kept."""

    @override
    def buffers(self, name: str, buffer: Buffer) -> Buffers:
        return {name: buffer}

    @override
    def decode(self, stored: Stored, name: str, buffer: Buffer) -> Tensor:
        return stored[name]

    @override
    def encode_(self, stored: Stored, name: str, buffer: Buffer, value: Tensor) -> None:
        pass

    @override
    def narrow(self, stored: Stored, name: str, start: int, length: int) -> Stored:
        return {name: stored[name].view(-1).narrow(0, start, length)}


class BFloat16(Plain):
    """bf16, rounded to nearest: for bases, which are not accumulated."""

    @override
    def buffers(self, name: str, buffer: Buffer) -> Buffers:
        return {name: _typed(buffer, torch.bfloat16)}

    @override
    def decode(self, stored: Stored, name: str, buffer: Buffer) -> Tensor:
        return stored[name].float()

    @override
    def encode_(self, stored: Stored, name: str, buffer: Buffer, value: Tensor) -> None:
        stored[name].copy_(value)


class EightBit(Encoding):
    """bitsandbytes' block-wise dynamic 8-bit: one code per element, one absmax per 256 elements in memory order.

    References:
        8-bit optimizers via block-wise quantization, arXiv 2110.02861.
    """

    block = 256

    @override
    def buffers(self, name: str, buffer: Buffer) -> Buffers:
        return {name: _typed(buffer, torch.uint8), f"{name}.absmax": _scales(buffer, self.block)}

    @override
    def decode(self, stored: Stored, name: str, buffer: Buffer) -> Tensor:
        functional = _bitsandbytes()
        code = _dynamic_code(buffer.slot.values != "positive", stored[name].device)
        absmax, codes = stored[f"{name}.absmax"], buffer.flat(stored[name])
        return buffer.laid(functional.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=self.block))

    @override
    def encode_(self, stored: Stored, name: str, buffer: Buffer, value: Tensor) -> None:
        functional = _bitsandbytes()
        code = _dynamic_code(buffer.slot.values != "positive", value.device)
        codes, quantized = functional.quantize_blockwise(buffer.flat(value), code=code, blocksize=self.block)
        if buffer.slot.values == "positive":  # code 0 is zero, which would be divided by
            codes.clamp_(min=1)
        stored[name].copy_(buffer.laid(codes))
        stored[f"{name}.absmax"].copy_(quantized.absmax)

    @override
    def narrow(self, stored: Stored, name: str, start: int, length: int) -> Stored:
        return {
            name: stored[name].view(-1).narrow(0, start, length),
            f"{name}.absmax": stored[f"{name}.absmax"].narrow(0, start // self.block, -(-length // self.block)),
        }


class FourBit(Encoding):
    """Block-wise linear 4-bit, two codes to a byte, one absmax per 128 elements in memory order.

    Signed values take the 15 levels -7/7 .. 7/7, which hold zero exactly and do not collapse on a block of one sign. A
    second moment takes 1/16 .. 16/16: zero is left out, since it would be divided by.

    References:
        Memory-efficient optimizers with 4-bit states, arXiv 2309.01507 (the second moment without a zero point).
    """

    block = 128

    @override
    def buffers(self, name: str, buffer: Buffer) -> Buffers:
        packed = replace(_typed(buffer, torch.uint8), shape=(-(-buffer.numel // 2),), turned=False)
        return {name: packed, f"{name}.absmax": _scales(buffer, self.block)}

    @override
    def decode(self, stored: Stored, name: str, buffer: Buffer) -> Tensor:
        packed = stored[name]
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten().float()
        levels = (codes + 1) / 16 if buffer.slot.values == "positive" else (codes - 7) / 7
        scales = stored[f"{name}.absmax"].repeat_interleave(self.block)[: codes.numel()]
        return buffer.laid((levels * scales)[: buffer.numel])

    @override
    def encode_(self, stored: Stored, name: str, buffer: Buffer, value: Tensor) -> None:
        blocks = stored[f"{name}.absmax"].numel()
        flat = torch.zeros(blocks * self.block, dtype=torch.float32, device=value.device)
        flat[: buffer.numel] = buffer.flat(value)
        rows = flat.view(blocks, self.block)
        absmax = rows.abs().amax(1)
        ratio = rows / torch.where(absmax > 0, absmax, 1.0).unsqueeze(1)
        if buffer.slot.values == "positive":
            codes = (ratio * 16).round().sub(1).clamp_(0, 15)
        else:
            codes = (ratio * 7).round().add(7)
        pairs = codes.to(torch.uint8).view(-1, 2)
        stored[name].copy_((pairs[:, 0] | pairs[:, 1] << 4)[: stored[name].numel()])
        stored[f"{name}.absmax"].copy_(absmax)

    @override
    def narrow(self, stored: Stored, name: str, start: int, length: int) -> Stored:
        return {
            name: stored[name].narrow(0, start // 2, -(-length // 2)),
            f"{name}.absmax": stored[f"{name}.absmax"].narrow(0, start // self.block, -(-length // self.block)),
        }


class Sliced(Encoding):
    """Another format for every matrix of a stack (its first axis) by itself, so that a stack can be split.

    Args:
        inner: the format of one matrix.
    """

    def __init__(self, inner: Encoding) -> None:
        self.inner = inner

    @override
    def buffers(self, name: str, buffer: Buffer) -> Buffers:
        one = self.inner.buffers(name, replace(buffer, shape=buffer.shape[1:]))
        return {key: replace(kept, shape=(buffer.shape[0], *kept.shape)) for key, kept in one.items()}

    @override
    def decode(self, stored: Stored, name: str, buffer: Buffer) -> Tensor:
        one = replace(buffer, shape=buffer.shape[1:])
        slices = [self.inner.decode(self._slice(stored, name, buffer, i), name, one) for i in range(buffer.shape[0])]
        return torch.stack(slices) if slices else stored[name].new_zeros(buffer.shape, dtype=torch.float32)

    @override
    def encode_(self, stored: Stored, name: str, buffer: Buffer, value: Tensor) -> None:
        one = replace(buffer, shape=buffer.shape[1:])
        for i in range(buffer.shape[0]):
            self.inner.encode_(self._slice(stored, name, buffer, i), name, one, value[i])

    @override
    def narrow(self, stored: Stored, name: str, start: int, length: int) -> Stored:
        """Bases are not narrowed."""
        raise NotImplementedError

    def _slice(self, stored: Stored, name: str, buffer: Buffer, i: int) -> Stored:
        return {key: stored[key][i] for key in self.buffers(name, buffer)}


FORMATS: dict[str, Encoding] = {"fp32": Plain(), "bf16": BFloat16(), "8bit": EightBit(), "4bit": FourBit()}


@lru_cache
def sliced(name: str) -> Encoding:
    """Return a format that keeps every matrix of a stack by itself."""
    return Sliced(FORMATS[name])


def _typed(buffer: Buffer, dtype: torch.dtype) -> Buffer:
    return replace(buffer, slot=replace(buffer.slot, dtype=dtype, axes_first=False))


def _scales(buffer: Buffer, block: int) -> Buffer:
    """Declare one fp32 scale per block of elements."""
    return Buffer(Slot("blocks", buffer.slot.lifetime, "exact"), (-(-buffer.numel // block),))


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
