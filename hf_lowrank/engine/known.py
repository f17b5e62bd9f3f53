"""What `param_groups` has said of a model's parameters, frozen ones too: for groups that are added later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Known(NamedTuple):
    """Of one parameter: its name, and the options of the group that it belongs to, with the key `rank` or without."""

    name: str
    options: Mapping[str, Any]


_known: MutableMapping[Tensor, Known] = WeakIdKeyDictionary()


def remember(p: Tensor, name: str, options: Mapping[str, Any]) -> None:
    """Keep what is known of a parameter, as long as it lives."""
    _known[p] = Known(name, options)


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
    found = [_known.get(p) if isinstance(p, Tensor) else None for p in params]
    unnamed = present and "param_names" in present[0] and "rank" not in group and params
    if not unnamed or any(known is None for known in found):
        yield {**group, "params": params}
        return
    together: dict[int, tuple[Mapping[str, Any], list[tuple[str, Tensor]]]] = {}
    for p, known in zip(params, found, strict=True):
        assert known is not None
        together.setdefault(id(known.options), (known.options, []))[1].append((known.name, p))
    for options, members in together.values():
        yield {**options, **group, "params": members}
