"""What former versions stored, as it is stored now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from hf_lowrank.state.formats import FORMATS, Blockwise
from hf_lowrank.state.slots import Buffers, Stored
from hf_lowrank.state.view import Encodings


def from_one_line(saved: Mapping[str, Tensor], buffers: Buffers, chosen: Encodings) -> Stored:
    """Return the state of a parameter whose blocks of codes followed each other in memory, across all lines.

    So they did in version 1 of a checkpoint. The numbers are those that the codes stood for. Where the blocks now are
    others, they are coded anew; where they are the same, so are the codes.

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
        form = chosen[name]
        now = {key: one.allocate(absmax) for key, one in form.buffers(name, buffer).items()}
        before, line, after = buffer.sides
        if isinstance(form, Blockwise) and after == 1 and (before == 1 or line % form.block == 0):
            now[name].copy_(codes.view(now[name].shape))
            now[f"{name}.absmax"].copy_(absmax.view(now[f"{name}.absmax"].shape))
        else:
            old = FORMATS["8bit" if codes.numel() == buffer.numel else "4bit"]
            one = replace(buffer, slot=replace(buffer.slot, axes="elements"), shape=(buffer.numel,), turned=False)
            flat = codes if codes.dim() == 1 else buffer.flat(codes)
            value = buffer.laid(old.decode({name: flat, f"{name}.absmax": absmax}, name, one))
            now[name].copy_(value) if form is FORMATS["fp32"] else form.encode_(now, name, buffer, value)
        found |= now
    return found
