"""Members of transformers' OptimizerNames for our methods. Imports transformers only when called."""

from __future__ import annotations

from enum import Enum
from typing import Any

from hf_lowrank.methods import resolve


def add_to(names: type[Enum]) -> None:
    """Add every method that is not there yet.

    An enum cannot be subclassed or extended by its own means once it has members, so the members are put where
    enum.EnumType puts them. They pickle by `restore`, so that a fresh process that reads training_args.bin registers
    the package by itself.

    Raises:
        ValueError: if transformers itself has a member of that name with another value.
    """
    existing = names._value2member_map_
    for value in resolve.names():
        name = value.upper()
        if value in existing:
            continue
        if name in names._member_map_:
            raise ValueError(f"{names.__name__}.{name} exists already, as {names[name].value!r}")
        member: Any = str.__new__(names, value)  # type: ignore[type-var]
        member._name_, member._value_, member.__objclass__ = name, value, names
        member._sort_order_ = len(names._member_names_)
        member.__reduce_ex__ = lambda protocol, value=value: (restore, (value,))
        type.__setattr__(names, name, member)
        names._member_names_.append(name)
        names._member_map_[name] = member
        names._value2member_map_[value] = member
        if hasattr(names, "_hashable_values_"):  # Python 3.12 and later answer `in` from here
            names._hashable_values_.append(value)


def remove_from(names: type[Enum]) -> None:
    """Take out every member that `add_to` put in."""
    for value in resolve.names():
        member = names._value2member_map_.get(value)
        if member is None or "__reduce_ex__" not in vars(member):
            continue
        del names._value2member_map_[value], names._member_map_[value.upper()]
        names._member_names_.remove(value.upper())
        type.__delattr__(names, value.upper())
        if hasattr(names, "_hashable_values_"):
            names._hashable_values_.remove(value)


def restore(value: str) -> Enum:
    """Return the member, registering the package first: what a pickled member names."""
    from transformers.training_args import OptimizerNames

    import hf_lowrank

    hf_lowrank.register()
    return OptimizerNames(value)  # type: ignore[no-any-return]
