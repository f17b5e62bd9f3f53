"""The parts by name, and what is common to all kinds of them. Needs no torch until a part is asked for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar


KINDS = ("subspace", "moments", "reconstruction")

TRANSPORTS = ("keep", "rotate", "rotate_variance", "rotate_variance_complete", "reset")
"""What can happen to the moments at a refresh: nothing; M <- C M; the same and V transported; the same with the lost
mass completed; both zeroed with their step count."""

CARRIED = ("keep", "rotate", "reset")
"""Those of them for a rule whose statistics are carried along as they are."""


@dataclass(frozen=True)
class Gauge:
    """A number that a part leaves for the log, one for every matrix; the part writes it to the state at every step.

    Attributes:
        help: what it is, in a line.
        counted: whether it counts the steps in which something was so: the log has its share of the steps since the
            last log. Else the log has its last value.
    """

    help: str
    counted: bool = False


class Part:
    """Registry by key, one for every kind of part; a class without a key is abstract.

    (Not `name`: ABCMeta of Python 3.10 has a parameter of that name itself.)

    Attributes:
        composable: whether the part may be combined freely with others, in the row `lowrank`.
        without: common options that mean nothing here and are refused.
        gauges: what the part leaves for the log, by name.
    """

    registry: ClassVar[dict[str, type[Any]]]
    composable: ClassVar[bool] = True
    without: ClassVar[tuple[str, ...]] = ()
    gauges: ClassVar[Mapping[str, Gauge]] = {}

    def __init_subclass__(cls, *, key: str | None = None) -> None:
        if key is None:
            if not hasattr(cls, "registry"):
                cls.registry = {}
        elif cls.registry.setdefault(key, cls).__qualname__ != cls.__qualname__:
            raise TypeError(f"two parts are named {key!r}")


def classes(kind: str) -> dict[str, type[Any]]:
    """Return the parts of one kind by name."""
    return _owner(kind).registry  # type: ignore[no-any-return]


def prototype(kind: str, part: Any) -> Any:
    """Return a part with its defaults, from its name or as it is."""
    return classes(kind)[part]() if isinstance(part, str) else part


@lru_cache
def _owner(kind: str) -> Any:
    """Return the base class of one kind of parts, having imported every file of its folder."""
    base = importlib.import_module("hf_lowrank.methods.parts")
    package = importlib.import_module(f"hf_lowrank.methods.{kind if kind == 'moments' else kind + 's'}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return getattr(base, kind.capitalize())
