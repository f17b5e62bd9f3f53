"""Typed options: a dataclass field is an option, its metadata says what values are valid. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from math import inf, isfinite
from typing import Any

from hf_lowrank.methods.suggestions import suggest as suggest


@dataclass(frozen=True)
class Option:
    """The declaration of an option; two parts have an option in common if they share one.

    Attributes:
        parse: from a Python value or text to the value.
        valid: whether a parsed value is valid.
        expected: what is valid, in words.
        help: what it means, in a line.
        fact: what of the model or the run it is, where that is known: "head_dim", "total_steps".
    """

    parse: Callable[[Any], Any]
    valid: Callable[[Any], bool]
    expected: str
    help: str
    fact: str = ""


def of(item: Field[Any]) -> Option:
    """Return the declaration that a field carries."""
    option: Option = item.metadata["option"]
    return option


def again(declared: Any) -> Any:
    """Declare the same option in another part."""
    return field(default=declared.default, metadata=declared.metadata)


def integer(default: int | None, *, minimum: int, help: str, fact: str = "") -> Any:
    """Declare an integer option of at least `minimum`; the default None means 'derived from other options'."""
    return _option(default, _whole, lambda v: minimum <= v < 2**63, f"an integer >= {minimum}", help, fact)


def number(
    default: float | None, *, above: float | None = None, minimum: float = 0.0, below: float = inf, help: str
) -> Any:
    """Declare a finite real option greater than `above`, or of at least `minimum`; and less than `below`.

    The default None means 'derived from other options'.
    """
    if above is None:
        expected = f"a number >= {minimum:g}" + (f" and < {below:g}" if below < inf else "")
        return _option(default, float, lambda v: isfinite(v) and minimum <= v < below, expected, help)
    expected = f"a number > {above:g}" + (f" and < {below:g}" if below < inf else "")
    return _option(default, float, lambda v: isfinite(v) and above < v < below, expected, help)


def choice(*values: str, derived: bool = False, help: str) -> Any:
    """Declare an option that is one of `values`; the first is the default, unless it is derived from other options."""
    default = None if derived else values[0]
    return _option(default, str, lambda v: v in values, "one of " + ", ".join(values), help)


def flag(default: bool, *, help: str) -> Any:
    """Declare a true/false option."""
    return _option(default, _boolean, lambda v: True, "true or false", help)


def switch(default: bool | str = "auto", *, word: str = "auto", help: str) -> Any:
    """Declare an option that is on, off or a third thing, which has a word of its own."""

    def parse(value: Any) -> bool | str:
        return word if str(value).lower() == word else _boolean(value)

    return _option(default, parse, lambda v: True, f"true, false or {word}", help)


def rank(default: float, *, help: str) -> Any:
    """Declare a rank: an integer >= 1, or a decimal below 1 as a fraction of the short side; 1.0 may mean either."""
    return _option(
        default, _rank, lambda v: v > 0, "an integer >= 1, or a decimal < 1 as a fraction of the short side", help
    )


def _option(default: Any, *declaration: Any) -> Any:
    return field(default=default, metadata={"option": Option(*declaration)})


def _whole(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
        raise ValueError
    return int(value)


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    return words[str(value).lower()]


def _rank(value: Any) -> float | int:
    number, text = float(value), str(value)
    unclear = number >= 1 and (number != int(number) or (number == 1 and text != "1"))
    if isinstance(value, bool) or not isfinite(number) or unclear:
        raise ValueError
    return int(number) if number >= 1 else number


def schema(*owners: Any) -> dict[str, Field[Any]]:
    """Return the option fields of several dataclasses by name.

    Raises:
        TypeError: if two of them declare the same name, each in a declaration of its own.
    """
    found: dict[str, Field[Any]] = {}
    for owner in owners:
        for item in fields(owner):
            if item.name in found and of(found[item.name]) is not of(item):
                raise TypeError(f"option {item.name!r} is declared by two parts of one method")
            found[item.name] = item
    return found


def parse(name: str, value: Any, options: Mapping[str, Field[Any]], *, what: str) -> Any:
    """Return `value` as the type of option `name`.

    Args:
        name: option to set.
        value: a Python value, or text as it comes from the command line.
        options: the valid options.
        what: whose options they are, for the message.

    Raises:
        ValueError: if the option does not exist (the nearest name is suggested) or the value is not valid.
    """
    if name not in options:
        raise ValueError(f"{what} has no option {name!r}{suggest(name, options)}")
    option = of(options[name])
    if value is None and options[name].default is None:
        return None
    try:
        parsed = option.parse(value)
        good = bool(option.valid(parsed))
    except (ValueError, TypeError, KeyError, OverflowError):
        good = False
    if not good:
        raise ValueError(f"{what}: option {name} must be {option.expected}, got {value!r}")
    return parsed


def split_assignments(text: str | None) -> dict[str, str]:
    """Read `k=v,k=v` as TrainingArguments.optim_args spells it. A comma within brackets is part of a value.

    Raises:
        ValueError: if it is no text, an item has no '=' or a key comes twice.
    """
    if not isinstance(text or "", str):
        raise ValueError(f"optim_args is text such as 'rank=128,update_proj_gap=200', not {text!r}")
    found: dict[str, str] = {}
    for item in filter(None, map(str.strip, re.findall(r"(?:\([^()]*\)|\[[^\[\]]*\]|[^,])+", text or ""))):
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"optim_args: {item!r} is not of the form option=value (options are separated by commas)")
        if key in found:
            raise ValueError(f"optim_args: {key} is given twice")
        found[key] = value
    return found
