"""What the groups of an optimizer are resolved to, and whether they were edited since they were last looked at."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from math import inf
from typing import Any

from torch import Tensor

from hf_lowrank.engine.checks import check_numbers, check_parameters, config_of, edited
from hf_lowrank.methods.resolve import Config


class Resolved:
    """The options of every group; groups may be edited, exchanged (as Lightning does) or given other members."""

    def __init__(self) -> None:
        self._known: list[tuple[Mapping[str, Any], Config]] = []
        self._seen: dict[int, dict[str, Any]] = {}  # of every group, but for lr
        self._changed = True

    def configs(self, groups: Sequence[dict[str, Any]]) -> list[Config]:
        """Return what every group is resolved to, as it was when last looked at."""
        known = self._known
        if len(known) != len(groups) or any(one is not now for (one, _), now in zip(known, groups, strict=True)):
            was = {id(p): config for group, config in known for p in group["params"]}  # what the state is built on
            before = (next((was[i] for i in _members(group) if i in was), None) for group in groups)
            same = [c if c and c.low_rank == ("rank" in g) else None for c, g in zip(before, groups, strict=True)]
            self.take(groups, [config or config_of(group) for config, group in zip(same, groups, strict=True)])
        return [config for _, config in self._known]

    def take(self, groups: Sequence[dict[str, Any]], configs: Sequence[Config]) -> None:
        """Take these as what the groups are."""
        self._known, self._changed = list(zip(groups, configs, strict=True)), True
        self._seen.clear()

    def look(self, groups: Sequence[dict[str, Any]], stepped: Container[Tensor]) -> bool:
        """Check what was edited since the last look, and tell whether steps have to be made anew.

        Args:
            groups: the groups.
            stepped: the parameters that have a state.

        Raises:
            ValueError: for a value or a parameter that is not valid, and for an edit of what the state is built on.
        """
        for i, (group, config) in enumerate(zip(groups, self.configs(groups), strict=True)):
            lr, before = group["lr"], self._seen.get(i)  # a schedule edits it at every step, and nothing else
            now = {**group, "lr": 0.0, "params": _members(group)}
            if now == before and isinstance(lr, (float, int)) and 0 <= lr < inf:
                continue
            check_numbers(group)
            check_parameters(group, config)
            options = edited(group, config, stepped)
            self._known[i] = group, options
            self._changed |= options is not config or before is None or now["params"] != before["params"]
            typed = {key: value for key, value in options.options.items() if key in group}  # what was given as text
            group.update(typed)
            self._seen[i] = now | typed
        changed, self._changed = self._changed, False
        return changed


def _members(group: Mapping[str, Any]) -> tuple[int, ...]:
    """Return which parameters a group has."""
    return tuple(map(id, group["params"]))
