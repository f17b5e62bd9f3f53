"""The published updates in plain float64, written from the papers or, where a file says so, from their released code.

Nothing here imports anything of the package.
REFERENCES holds one entry per part, {(kind, name): Entry}: every file of this folder adds its own.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from torch import Tensor

from references.base import Matrix
from references.case import Case, Entry, assemble
from references.twosided import TwoSided


KINDS = ("subspace", "moments", "reconstruction")
REFERENCES: dict[tuple[str, str], Entry] = {}
for _module in pkgutil.iter_modules(__path__):
    REFERENCES |= getattr(importlib.import_module(f"references.{_module.name}"), "REFERENCES", {})


def entry(kind: str, name: str) -> Entry:
    """Return the reference of a part.

    Raises:
        LookupError: if it has none.
    """
    try:
        return REFERENCES[kind, name]
    except KeyError:
        raise LookupError(f"no reference for {kind} {name!r}: add REFERENCES to a file of tests/references") from None


def reference(case: Case, W: Tensor, parts: tuple[str, str, str], **extra: Any) -> Matrix:
    """Return the reference of one matrix, in float64.

    Args:
        case: the run.
        W: the weight before it.
        parts: names of subspace, moments and reconstruction.
        extra: attributes that are to differ from what the options say.
    """
    entries = [entry(kind, name) for kind, name in zip(KINDS, parts, strict=True)]
    if case.options.get("proj_type") == "full":  # the same rule for the other side
        other = entries[0].fields(case).get("choose")
        entries.append(Entry(TwoSided, lambda case: {"choose_right": other} if other else {}))
    return assemble(entries[::-1], case, W, **extra)
