"""The parts by name, and what is common to all kinds of them."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from typing import Any, ClassVar


KINDS = ("subspace", "moments", "reconstruction")

TRANSPORTS = ("keep", "rotate", "rotate_variance", "rotate_variance_complete", "reset")
"""What can happen to the moments at a refresh: nothing; M <- C M; the same and V transported; the same with the lost
mass completed; both zeroed with their step count."""


def _prototype(kind: str, part: Any) -> Any:
    return _registry(kind)[part]() if isinstance(part, str) else part


def _registry(kind: str) -> dict[str, type[Any]]:
    """Return the parts of one kind by name."""
    return _owner(kind).registry  # type: ignore[no-any-return]


@lru_cache
def _owner(kind: str) -> Any:
    """Return the base class of one kind of parts, having imported every file of its folder."""
    base = importlib.import_module("hf_lowrank.methods.parts")
    package = importlib.import_module(f"hf_lowrank.methods.{kind if kind == 'moments' else kind + 's'}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return getattr(base, kind.capitalize())


class Part:
    """Registry by key, one for every kind of part; a class without a key is abstract.

    (Not `name`: ABCMeta of Python 3.10 has a parameter of that name itself.)

    Attributes:
        composable: whether the part may be combined freely with others, in the row `lowrank`.
    """

    registry: ClassVar[dict[str, type[Any]]]
    composable: ClassVar[bool] = True

    def __init_subclass__(cls, *, key: str | None = None) -> None:
        if key is None:
            if not hasattr(cls, "registry"):
                cls.registry = {}
        elif cls.registry.setdefault(key, cls).__qualname__ != cls.__qualname__:
            raise TypeError(f"two parts are named {key!r}")
