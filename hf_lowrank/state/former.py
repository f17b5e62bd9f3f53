"""What former versions stored, as it is stored now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from hf_lowrank.state.formats import CURVED, EVEN, FORMATS, Blockwise, Code, FourBit
from hf_lowrank.state.slots import Buffer, Buffers, Stored
from hf_lowrank.state.view import Encodings
from hf_lowrank.tensors.layout import local


def from_former_names(saved: Mapping[str, Tensor], buffers: Buffers) -> Stored:
    """Return the state of a parameter by the names that its tensors have now, where their slots had others."""
    renamed = {buffer.slot.formerly: key for key, buffer in buffers.items() if buffer.slot.formerly not in buffers}
    return {renamed.get(key, key): x for key, x in saved.items()}


class EvenFourBit(FourBit):
    """4-bit codes as they were up to version 2: the levels of moments evenly spaced."""

    @override
    def code_of(self, buffer: Buffer) -> Code:
        now = super().code_of(buffer)
        return EVEN if now is CURVED else now


EVEN_4BIT = EvenFourBit()


def from_even_levels(saved: Mapping[str, Tensor], buffers: Buffers, chosen: Encodings) -> Stored:
    """Return the state of a parameter whose 4-bit moments had evenly spaced levels, as up to version 2: coded anew.

    Args:
        saved: the stored tensors; of sharded ones, the pieces of this process are.
        buffers: what is declared, for the whole parameter or for its piece as `saved` is.
        chosen: the formats of those.
    """
    found = dict(saved)
    for name, buffer in buffers.items():
        form = chosen[name]
        if not (isinstance(form, FourBit) and form.code_of(buffer) is CURVED and name in saved):
            continue
        keys = form.buffers(name, buffer).keys()
        here = {key: local(saved[key]).clone() for key in keys}
        form.encode_(here, name, buffer, EVEN_4BIT.decode(here, name, buffer))
        for key, now in here.items():
            was = saved[key]
            found[key] = (
                now
                if not isinstance(was, DTensor)
                else DTensor.from_local(
                    now, was.device_mesh, was.placements, run_check=False, shape=was.shape, stride=was.stride()
                )
            )
    return found


def from_one_line(saved: Mapping[str, Tensor], buffers: Buffers, chosen: Encodings) -> Stored:
    """Return the state of a parameter whose blocks of codes followed each other in memory, across all lines.

    So they did in version 1 of a checkpoint; what is returned is as in version 2. The numbers are those that the codes
    stood for. Where the blocks now are others, they are coded anew; where they are the same, so are the codes.

    Args:
        saved: the stored tensors.
        buffers: what is declared for the whole parameter.
        chosen: the formats of those.
    """
    found = dict(saved)
    for name, buffer in buffers.items():
        if buffer.slot.lifetime == "basis" or f"{name}.absmax" not in saved:
            continue
        codes, absmax = found.pop(name), found.pop(f"{name}.absmax")
        form = EVEN_4BIT if chosen[name] is FORMATS["4bit"] else chosen[name]
        now = {key: one.allocate(absmax) for key, one in form.buffers(name, buffer).items()}
        before, line, after = buffer.sides
        if isinstance(form, Blockwise) and after == 1 and (before == 1 or line % form.block == 0):
            now[name].copy_(codes.view(now[name].shape))
            now[f"{name}.absmax"].copy_(absmax.view(now[f"{name}.absmax"].shape))
        else:
            old = FORMATS["8bit"] if codes.numel() == buffer.numel else EVEN_4BIT
            one = replace(buffer, slot=replace(buffer.slot, axes="elements"), shape=(buffer.numel,), turned=False)
            flat = codes if codes.dim() == 1 else buffer.flat(codes)
            value = buffer.laid(old.decode({name: flat, f"{name}.absmax": absmax}, name, one))
            now[name].copy_(value) if form is FORMATS["fp32"] else form.encode_(now, name, buffer, value)
        found |= now
    return found
