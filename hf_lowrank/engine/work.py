"""What there is to do: every parameter's plan, its state, and the steps that are made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_lowrank.engine import step
from hf_lowrank.engine.dense import DenseStep
from hf_lowrank.engine.known import names_of, places_of
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.engine.plan import Plan
from hf_lowrank.engine.refresh import team
from hf_lowrank.engine.schedule import refresh_cost, staggered_intervals
from hf_lowrank.engine.sharding import allocate, check_replicas
from hf_lowrank.engine.stacks import Stack, stacked
from hf_lowrank.methods.resolve import Config
from hf_lowrank.state.slots import Buffers
from hf_lowrank.tensors.splits import team_of


if TYPE_CHECKING:
    from hf_lowrank.engine.layerwise import Layerwise
    from hf_lowrank.engine.ownership import Owners


class Declared(NamedTuple):
    """What is known of a parameter before its first step; the name is "" if unknown."""

    name: str
    weight: Tensor
    config: Config
    plan: Plan

    @property
    def kept(self) -> Buffers:
        """The stored tensors: of one that requires no gradient, counters alone."""
        return self.plan.kept if self.weight.requires_grad else self.plan.lasting

    @property
    def nbytes(self) -> int:
        """Bytes of this process's state."""
        return sum(buffer.nbytes for buffer in self.kept.values())


def declared(groups: Sequence[Mapping[str, Any]], configs: Sequence[Config]) -> Iterator[Declared]:
    """Yield what is known of every parameter, in group order."""
    for group, config in zip(groups, configs, strict=True):
        for name, p in zip(names_of(group), group["params"], strict=True):
            yield Declared(name, p, config, Plan.of(p, config, name))


class Work:
    """The steps of all parameters, which last as long as options and state do.

    Creates the state of every parameter that has none: all of it where a gradient is required, else counters alone.

    Args:
        groups: the parameter groups.
        configs: what each was resolved to.
        state: the optimizer's state.
        owners: whose a parameter is, where state is sharded: only the owner keeps state and steps it.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        configs: Sequence[Config],
        state: MutableMapping[Tensor, Any],
        owners: Owners | None = None,
    ) -> None:
        self.plans: dict[Tensor, Plan] = {}
        self.by_weight: dict[Tensor, MatrixStep | DenseStep] = {}  # of what is stepped alone
        self.units: list[MatrixStep | DenseStep] = []
        self.stacks: list[Stack] = []
        self.names: dict[MatrixStep | DenseStep, list[str]] = {}
        self.asleep: set[Tensor] = set()  # with counters alone
        for group, config, places in zip(groups, configs, places_of(groups), strict=True):
            check_replicas(group, config)
            members: list[tuple[int, Declared]] = []  # by their places in group order
            for i, one in zip(places, declared([group], [config]), strict=True):
                p = one.weight
                self.plans[p] = one.plan
                if owners is not None and not owners.here(p):
                    continue
                if prepare(state, p, one.plan):
                    members.append((i, one))
                else:
                    self.asleep.add(p)
            if config.by_matrix:
                steps = [MatrixStep(p, state[p], config, plan, group, i) for i, (_, p, _, plan) in members]
                self.by_weight |= {unit.weight: unit for unit in steps}
                self.names |= {unit: [one.name] for unit, (_, one) in zip(steps, members, strict=True)}
                self.units += steps
                self.stacks += stacked(steps)
                continue
            self._take_dense(members, group, config, state)
        own = [p for p in self.plans if owners is None or owners.here(p)]
        self._held: dict[Tensor, tuple[Any, list[Tensor]]] = {p: (state[p], [*state[p].values()]) for p in own}

    def _take_dense(
        self,
        members: Sequence[tuple[int, Declared]],
        group: Mapping[str, Any],
        config: Config,
        state: Mapping[Tensor, Any],
    ) -> None:
        """Make steps of a group's dense parameters: of those in one place together, unless hooks step each alone."""
        together: dict[Any, list[tuple[int, Declared]]] = defaultdict(list)
        for i, one in members:
            place = getattr(one.weight, "device_mesh", None), team_of(one.weight)
            together[i if config.hooked else place].append((i, one))
        for here in together.values():
            weights, plans = [one.weight for _, one in here], [one.plan for _, one in here]
            unit = DenseStep(weights, [state[p] for p in weights], config, plans, group, [i for i, _ in here])
            self.units.append(unit)
            self.names[unit] = [one.name for _, one in here]
            if config.hooked:
                self.by_weight[weights[0]] = unit

    @property
    def matrices(self) -> list[MatrixStep]:
        """The steps of all matrices."""
        return [unit for unit in self.units if isinstance(unit, MatrixStep)]

    @property
    def offloaded(self) -> dict[Tensor, MatrixStep | DenseStep]:
        """What has its gradients in host memory, by weight."""
        return {weight: unit for weight, unit in self.by_weight.items() if unit.config.offloads}

    @contextmanager
    def stepping(self, layerwise: Layerwise) -> Iterator[None]:
        """Let steps be made without autocast; whatever happens, nothing that was read of gradients outlives them."""
        try:
            with torch.autocast(self.units[0].device.type if self.units else "cpu", enabled=False):
                yield
        finally:
            layerwise.forget((*self.units, *self.stacks))

    def holds(self, state: Mapping[Tensor, Any], some: Iterable[Tensor]) -> bool:
        """Tell whether the state of some parameters is what is stepped; it may have been moved, dropped or missed."""
        for p in some:
            if p in self._held:
                was, tensors = self._held[p]
                moved = len(was) != len(tensors) or not all(map(is_, was.values(), tensors))
                if moved or state.get(p) is not was:
                    return False
        return not any(p.requires_grad for p in self.asleep)


def prepare(state: MutableMapping[Tensor, Any], p: Tensor, plan: Plan) -> bool:
    """Create the state that a parameter lacks, and tell whether all of it is there, so that it can be stepped."""
    if p.requires_grad and not plan.kept.keys() <= state[p].keys():
        state[p] = {**allocate(p, plan), **state[p]}
    elif not state[p]:
        state[p] = allocate(p, plan, trained=False)
    return set(plan.kept) <= set(state[p])


def forget(state: MutableMapping[Tensor, Any], known: Iterable[Declared], params: Iterable[Tensor]) -> None:
    """Drop the state of some parameters but for counters and what is logged; the bases that they had stay counted."""
    wanted = set(params)
    for _, p, _, plan in known:
        if p in wanted and state.get(p):
            state[p] = s = {key: state[p][key] for key in plan.lasting}
            s["moment_step"].zero_()
            if "refreshes" in s:
                s["earlier"].add_(s["refreshes"])
                s["refreshes"].zero_()
                s["refresh_at"].copy_(s["step"])
                s["dropped_at"].copy_(s["step"])


def spreads(unit: MatrixStep) -> bool:
    """Tell whether refreshes are spread over the interval: with `auto` in the layerwise mode, and where an accelerator
    would wait for bases that are kept."""
    options = unit.config.options
    wanted = options.get("stagger", False)
    if wanted == "auto":
        return bool(options["layerwise"] or (step.at_once(unit.device) and unit.view.bases))
    return bool(wanted)


def first_intervals(
    due: Sequence[MatrixStep], groups: Sequence[Mapping[str, Any]], configs: Sequence[Config], *, share: bool
) -> dict[MatrixStep, int]:
    """Return the steps from the first refresh to the second, where refreshes are spread over the interval: all
    matrices that have it, whatever their groups."""
    found: dict[MatrixStep, int] = {}
    intervals: dict[tuple[int, int], dict[Tensor, int]] = {}
    for unit in due:
        if unit.stored["refreshes"] == 0 and spreads(unit):
            gap, world = unit.config.options["update_proj_gap"], team(unit.mesh, share=share)[1]
            if (gap, world) not in intervals:
                pairs = zip(groups, configs, strict=True)
                alike = [group for group, config in pairs if config.options.get("update_proj_gap") == gap]
                weights = [p for group in alike for p in group["params"]]
                first = staggered_intervals([refresh_cost(p) for p in weights], gap, world)
                intervals[gap, world] = dict(zip(weights, first, strict=True))
            found[unit] = intervals[gap, world][unit.weight]
    return found
