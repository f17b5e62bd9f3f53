"""Number formats of the state: what is stored for an fp32 tensor, and the way there and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import tan
from typing import Any, ClassVar, NamedTuple

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


class Blockwise(Encoding):
    """Codes of x / absmax, with an fp32 absmax for every block of at most `block` elements of a line (see Buffer).

    No block reaches into another line, so the piece that a process holds has the codes and scales of the whole.
    """

    block: ClassVar[int]

    @override
    def buffers(self, name: str, buffer: Buffer) -> Buffers:
        blocks = -(-buffer.sides[1] // self.block)
        scales = Slot("blocks", buffer.slot.lifetime, "exact")
        return {name: self._declare(buffer), f"{name}.absmax": buffer.per_line(scales, blocks)}

    @override
    def decode(self, stored: Stored, name: str, buffer: Buffer) -> Tensor:
        if not buffer.numel:
            return stored[name].new_zeros(buffer.shape, dtype=torch.float32)
        levels = self._levels(stored[name], buffer)
        before, line, after = levels.shape
        scales = stored[f"{name}.absmax"].reshape(before, -1, after)
        width = min(self.block, line)
        if line % width == 0:
            levels.view(before, -1, width, after).mul_(scales.unsqueeze(2))
        else:
            levels.mul_(scales.repeat_interleave(self.block, 1)[:, :line])
        return buffer.laid(levels.view(-1))

    @override
    def encode_(self, stored: Stored, name: str, buffer: Buffer, value: Tensor) -> None:
        x = buffer.flat(value).view(buffer.sides)
        if not x.numel():
            return
        before, line, after = x.shape
        width = min(self.block, line)
        blocks = _padded(x, width).view(before, -1, width, after)
        absmax = blocks.abs().amax(2)
        ratio = (blocks / torch.where(absmax > 0, absmax, 1.0).unsqueeze(2)).view(before, -1, after)[:, :line]
        stored[name].copy_(self._codes(ratio, buffer))
        stored[f"{name}.absmax"].copy_(absmax.view(stored[f"{name}.absmax"].shape))

    @abstractmethod
    def _declare(self, buffer: Buffer) -> Buffer:
        """Declare the stored codes."""

    @abstractmethod
    def _codes(self, ratio: Tensor, buffer: Buffer) -> Tensor:
        """Return the codes, as they are stored, of numbers (before, line, after) in [-1, 1], which are overwritten."""

    @abstractmethod
    def _levels(self, codes: Tensor, buffer: Buffer) -> Tensor:
        """Return the numbers of codes, (before, line, after)."""


class EightBit(Blockwise):
    """bitsandbytes' block-wise dynamic 8-bit: one code per element, one absmax per 256 elements of a line.

    References:
        8-bit optimizers via block-wise quantization, arXiv 2110.02861.
    """

    block = 256

    @override
    def decode(self, stored: Stored, name: str, buffer: Buffer) -> Tensor:
        if not self._blocks_follow(buffer):
            return super().decode(stored, name, buffer)
        codes, absmax = buffer.flat(stored[name]), stored[f"{name}.absmax"].reshape(-1)
        return buffer.laid(_valued(codes, absmax, self.block, buffer))

    @override
    def encode_(self, stored: Stored, name: str, buffer: Buffer, value: Tensor) -> None:
        if not self._blocks_follow(buffer):
            super().encode_(stored, name, buffer, value)
            return
        codes, absmax = _coded(buffer.flat(value), self.block, buffer)
        stored[name].copy_(buffer.laid(codes))
        stored[f"{name}.absmax"].copy_(absmax.view(stored[f"{name}.absmax"].shape))

    def _blocks_follow(self, buffer: Buffer) -> bool:
        """Tell whether one block follows the other in memory, as the kernel has them."""
        before, line, after = buffer.sides
        return after == 1 and buffer.numel > 0 and (before == 1 or line % self.block == 0)

    @override
    def _declare(self, buffer: Buffer) -> Buffer:
        return _typed(buffer, torch.uint8)

    @override
    def _codes(self, ratio: Tensor, buffer: Buffer) -> Tensor:
        """In front of every block of the kernel stands a 1, so that it has no scale of its own."""
        flat = ratio.reshape(-1)
        whole = len(flat) // 255
        rows = flat.new_empty(-(-len(flat) // 255), 256)
        rows[:, 0] = 1
        rows[:whole, 1:].copy_(flat[: whole * 255].view(-1, 255))
        rows[whole:, 1:] = 0
        rows[whole:, 1 : len(flat) - whole * 255 + 1].copy_(flat[whole * 255 :])
        codes = _coded(rows.view(-1), 256, buffer)[0].view(-1, 256)[:, 1:]
        return buffer.laid(codes.reshape(-1)[: len(flat)])

    @override
    def _levels(self, codes: Tensor, buffer: Buffer) -> Tensor:
        flat = buffer.flat(codes)
        ones = torch.ones(-(-len(flat) // 4096), dtype=torch.float32, device=flat.device)
        return _valued(flat, ones, 4096, buffer).view(buffer.sides)


class Code(NamedTuple):
    """What sixteen codes stand for, in units of a block's absmax."""

    encode: Callable[[Tensor], Tensor]
    """Of values, which it overwrites, to codes that are yet to be cut to whole numbers."""
    decode: Callable[[Tensor], Tensor]
    """Of codes to values."""


EVEN = Code(lambda x: x.mul_(7).round_().add_(7), lambda code: (code - 7) / 7)
CURVED = Code(  # half is added instead of rounding: nothing lies halfway between two codes
    lambda x: x.mul_(tan(1.0)).atan_().mul_(7).add_(7.5), lambda code: ((code - 7) / 7).tan() / tan(1.0)
)
POSITIVE = Code(lambda x: x.mul_(16).round_().sub_(1).clamp_(0, 15), lambda code: (code + 1) / 16)


class FourBit(Blockwise):
    """Block-wise 4-bit, two codes of a line to a byte, one absmax per 128 elements of a line.

    Signed values take 15 levels, which hold zero exactly and do not collapse on a block of one sign: of a basis x =
    -7/7 .. 7/7, of a moment tan(x) / tan(1). These lie within 0.02 of the levels with the least mean square error for
    128 Gaussians in units of their absmax. A second moment takes 1/16 .. 16/16: zero is left out, since it would be
    divided by.

    References:
        Memory-efficient optimizers with 4-bit states, arXiv 2309.01507 (levels that lie closer at zero for the first
        moment; the second moment without a zero point).
    """

    block = 128

    def code_of(self, buffer: Buffer) -> Code:
        """Return the code of a buffer's values."""
        if buffer.slot.values == "positive":
            return POSITIVE
        return EVEN if buffer.slot.of_basis else CURVED

    @override
    def _declare(self, buffer: Buffer) -> Buffer:
        slot = replace(buffer.slot, axes="pairs", dtype=torch.uint8, axes_first=False)
        return buffer.per_line(slot, -(-buffer.sides[1] // 2))

    @override
    def _codes(self, ratio: Tensor, buffer: Buffer) -> Tensor:
        pairs = _padded(self.code_of(buffer).encode(ratio).to(torch.uint8), 2)
        return (pairs[:, ::2] | pairs[:, 1::2] << 4).view(self._declare(buffer).shape)

    @override
    def _levels(self, codes: Tensor, buffer: Buffer) -> Tensor:
        before, line, after = buffer.sides
        table, byte = _levels_of_bytes(self.code_of(buffer), codes.device), codes.reshape(-1).int()
        if after == 1:  # the two of a byte follow each other
            levels = table.index_select(0, byte)
        else:
            levels = torch.stack([one.index_select(0, byte).view(before, -1, after) for one in table.unbind(1)], 2)
        return levels.view(before, -1, after)[:, :line].contiguous()


@lru_cache
def _levels_of_bytes(code: Code, device: torch.device) -> Tensor:
    """Return the two levels that every byte stands for, (256, 2), that of its low four bits first."""
    levels = code.decode(torch.arange(16, dtype=torch.float32, device="cpu"))
    byte = torch.arange(256, device="cpu")
    return torch.stack([levels[byte & 15], levels[byte >> 4]], 1).to(device)


FORMATS: dict[str, Encoding] = {"fp32": Plain(), "bf16": BFloat16(), "8bit": EightBit(), "4bit": FourBit()}


def _typed(buffer: Buffer, dtype: torch.dtype) -> Buffer:
    return replace(buffer, slot=replace(buffer.slot, dtype=dtype, axes_first=False))


def _padded(x: Tensor, width: int) -> Tensor:
    """Return x (before, line, after) with zeros up to a multiple of `width` of its second axis."""
    missing = -x.shape[1] % width
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


def _coded(flat: Tensor, block: int, buffer: Buffer) -> tuple[Tensor, Tensor]:
    """Return codes and absmax of blocks in the order of memory."""
    positive = buffer.slot.values == "positive"
    table = _dynamic_code(not positive, flat.device)
    codes, state = _bitsandbytes().quantize_blockwise(flat, code=table, blocksize=block)
    return codes.clamp_(min=1) if positive else codes, state.absmax  # code 0 is zero, which would be divided by


def _valued(codes: Tensor, absmax: Tensor, block: int, buffer: Buffer) -> Tensor:
    """Undo `_coded`."""
    table = _dynamic_code(buffer.slot.values != "positive", codes.device)
    value: Tensor = _bitsandbytes().dequantize_blockwise(codes, absmax=absmax, code=table, blocksize=block)
    return value


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
