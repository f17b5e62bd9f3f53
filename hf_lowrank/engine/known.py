"""What `param_groups` has said of a model's parameters, frozen ones too: for groups that are added later."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_lowrank.methods.resolve import Config


class Known(NamedTuple):
    """Of one parameter: its name, the options of the group that it belongs to (with the key `rank` or without), and
    what those are resolved to, if they have been."""

    name: str
    options: Mapping[str, Any]
    config: Config | None


class _Place(NamedTuple):
    """Where a parameter is. A weak reference to itself would keep torch from swapping it (`Module.to`)."""

    module: weakref.ref[nn.Module]
    attribute: str
    known: Known


_places: dict[int, _Place] = {}
"""By the id of a parameter, which may be another one's by now."""


def remember(model: nn.Module, known: Mapping[Tensor, Known]) -> None:
    """Keep what is known of a model's parameters, as long as the modules live that have them."""
    for key in [key for key, place in _places.items() if place.module() is None]:
        del _places[key]
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if p is not None and p in known:
                _places[id(p)] = _Place(weakref.ref(module), attribute, known[p])


@contextmanager
def unsaid() -> Iterator[None]:
    """Forget what is said inside this context: a plan changes nothing of a run."""
    before = dict(_places)
    try:
        yield
    finally:
        _places.clear()
        _places.update(before)


def _of(p: Any) -> Known | None:
    """Return what is known of a parameter."""
    place = _places.get(id(p))
    module = None if place is None else place.module()
    found = place is not None and module is not None and module._parameters.get(place.attribute) is p
    return place.known if place is not None and found else None


def resolved(group: Mapping[str, Any], given: Mapping[str, Any]) -> Config | None:
    """Return what `param_groups` has resolved a group to, if it is as it was then but for the seed.

    Args:
        group: a new group.
        given: its options, and the seed.
    """
    first = next(iter(group["params"]), None)
    found = _of(first[1] if isinstance(first, tuple) else first)
    if found is None or found.config is None or group.get("method") != found.config.method:
        return None
    config = found.config.with_(seed=given["seed"])
    return config if given == dict(config.options) else None


def names_of(group: Mapping[str, Any]) -> list[str]:
    """Return the names of a group's parameters, "" for those that have none.

    A wrapper that leaves some of the parameters to other processes (torch's ZeroRedundancyOptimizer) sorts those that
    are here, and leaves the names of all in the group: each has the name then that `param_groups` gave it, unless
    it has named them for another model since, such as a part of this one.
    """
    names, params = group.get("param_names"), group["params"]
    if not names:
        return [""] * len(params)
    given = [known.name if (known := _of(p)) else "" for p in params]
    same = len({*given}) == len(given) and {*given} <= {*names}
    return given if same else list(names)


def places_of(groups: Sequence[Mapping[str, Any]]) -> Iterator[list[int]]:
    """Yield for every group the places of its parameters among those of all groups, left to other processes or not."""
    first = 0
    for group in groups:
        names, here = group.get("param_names") or [], names_of(group)
        place = {name: i for i, name in enumerate(names, first)}
        yield [*range(first, first + len(here))] if here == names or not names else [place[name] for name in here]
        first += max(len(names), len(here))


def named_groups(group: Mapping[str, Any], present: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a group as it is or, if its parameters have no names beside named ones, as the groups of their model.

    Lightning's BaseFinetuning and its like add parameters that were frozen as {"params": [...]}; they are low-rank or
    dense by the rules of the groups that are there.

    Args:
        group: a new group.
        present: the groups so far.
    """
    if isinstance(group["params"], set):  # whose order torch refuses
        yield dict(group)
        return
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    found = [_of(p) for p in params]
    unnamed = present and "param_names" in present[0] and not {"rank", "param_names"} & set(group) and params
    if not unnamed or any(known is None for known in found):
        yield {**group, "params": params}
        return
    together: dict[int, tuple[Mapping[str, Any], list[tuple[str, Tensor]]]] = {}
    for p, known in zip(params, found, strict=True):
        assert known is not None
        together.setdefault(id(known.options), (known.options, []))[1].append((known.name, p))
    for options, members in together.values():
        yield {**options, **group, "params": members}
