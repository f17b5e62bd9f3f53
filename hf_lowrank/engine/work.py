"""What there is to do: every parameter's plan, its state, and the steps that are made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor

from hf_lowrank.engine import step
from hf_lowrank.engine.dense import DenseStep
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.engine.plan import Plan
from hf_lowrank.engine.refresh import team
from hf_lowrank.engine.schedule import refresh_cost, staggered_intervals
from hf_lowrank.engine.sharding import allocate, check_replicas, check_weight
from hf_lowrank.engine.stacks import Stack, stacked
from hf_lowrank.methods.resolve import Config


class Declared(NamedTuple):
    """What is known of a parameter before its first step; the name is "" if unknown."""

    name: str
    weight: Tensor
    config: Config
    plan: Plan


def declared(groups: Sequence[Mapping[str, Any]], configs: Sequence[Config]) -> Iterator[Declared]:
    """Yield what is known of every parameter, in group order."""
    for group, config in zip(groups, configs, strict=True):
        names = group.get("param_names") or [""] * len(group["params"])
        for name, p in zip(names, group["params"], strict=True):
            yield Declared(name, p, config, Plan.of(p, config, name))


class Work:
    """The steps of all parameters, which last as long as options and state do.

    Creates the state of every parameter that has none, with or without a gradient.

    Args:
        groups: the parameter groups.
        configs: what each was resolved to.
        state: the optimizer's state.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], configs: Sequence[Config], state: MutableMapping[Tensor, Any]
    ) -> None:
        self.plans: dict[Tensor, Plan] = {}
        self.by_weight: dict[Tensor, MatrixStep | DenseStep] = {}  # of what is stepped alone
        self.units: list[MatrixStep | DenseStep] = []
        self.stacks: list[Stack] = []
        for group, config in zip(groups, configs, strict=True):
            check_replicas(group, config)
            first, members = len(self.plans), list(declared([group], [config]))
            for _, p, _, plan in members:
                self.plans[p] = plan
                if not state[p]:
                    check_weight(p, config)
                    state[p] = allocate(p, plan)
            if config.by_matrix:
                steps = [
                    MatrixStep(p, state[p], config, plan, group, first + i)
                    for i, (_, p, _, plan) in enumerate(members)
                ]
                self.by_weight |= {unit.weight: unit for unit in steps}
                self.units += steps
                self.stacks += stacked(steps)
                continue
            apart = config.hooked  # each is stepped alone
            together: dict[Any, list[tuple[int, Declared]]] = defaultdict(list)
            for i, one in enumerate(members, first):
                together[i if apart else getattr(one.weight, "device_mesh", None)].append((i, one))
            for here in together.values():
                weights, plans = [one.weight for _, one in here], [one.plan for _, one in here]
                unit = DenseStep(weights, [state[p] for p in weights], config, plans, group, [i for i, _ in here])
                self.units.append(unit)
                if apart:
                    self.by_weight[weights[0]] = unit
        self._held: dict[Tensor, tuple[Any, list[Tensor]]] = {p: (state[p], [*state[p].values()]) for p in self.plans}

    @property
    def matrices(self) -> list[MatrixStep]:
        """The steps of all matrices."""
        return [unit for unit in self.units if isinstance(unit, MatrixStep)]

    @property
    def offloaded(self) -> dict[Tensor, MatrixStep | DenseStep]:
        """What has its gradients in host memory, by weight."""
        return {weight: unit for weight, unit in self.by_weight.items() if unit.config.offloads}

    def holds(self, state: Mapping[Tensor, Any], some: Iterable[Tensor]) -> bool:
        """Tell whether the state of some parameters is what is stepped; it may have been moved or dropped."""
        for p in some:
            if p in self._held:
                was, tensors = self._held[p]
                moved = len(was) != len(tensors) or not all(map(is_, was.values(), tensors))
                if moved or state.get(p) is not was:
                    return False
        return True


def spreads(unit: MatrixStep) -> bool:
    """Tell whether refreshes are spread over the interval: with `auto` where somebody would wait for them."""
    options = unit.config.options
    wanted = options.get("stagger", False)
    if wanted == "auto":
        return bool(options["layerwise"] or (step.at_once(unit.device) and unit.view.bases))
    return bool(wanted)


def first_intervals(due: Sequence[MatrixStep], *, share: bool) -> dict[MatrixStep, int]:
    """Return the steps from the first refresh to the second, where refreshes are spread over the interval."""
    found = {}
    for unit in due:
        options = unit.config.options
        if unit.stored["refreshes"] == 0 and spreads(unit):
            weights, world = unit.group["params"], team(unit.mesh, share=share)[1]
            intervals = staggered_intervals([refresh_cost(p) for p in weights], options["update_proj_gap"], world)
            found[unit] = next(first for p, first in zip(weights, intervals, strict=True) if p is unit.weight)
    return found
