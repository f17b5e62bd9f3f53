"""LowRankOptimizer: groups, the step, state, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from time import perf_counter
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hf_lowrank.engine import layerwise, step
from hf_lowrank.engine.checkpoint import check_checkpoint, merge_options, warn_changed
from hf_lowrank.engine.checks import TORCH_KEYS, check_edits, check_group
from hf_lowrank.engine.dense import DenseStep
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.engine.plan import Plan, declared_state
from hf_lowrank.engine.schedule import refresh_cost, staggered_intervals
from hf_lowrank.engine.sharding import adopt, allocate, check_weight, whole_if_needed
from hf_lowrank.methods import resolve
from hf_lowrank.methods.resolve import Parts
from hf_lowrank.state import view
from hf_lowrank.state.view import FORMAT_VERSION
from hf_lowrank.tensors.sums import alone


class LowRankOptimizer(Optimizer):
    """Trains every parameter, with the moments of the matrices kept in a subspace of their gradient.

    A group with the key `rank` holds matrices and is low-rank; one without is dense and takes the same rule with no
    subspace. Other options of the method (resolve.LowRankOptions and the fields of its parts) are keys of the group.
    The values of a group may be edited while training.

    Args:
        params: parameters or groups, as for any torch optimizer; `param_groups` makes them from a model.
        method: a name from METHODS.
        lr: learning rate; the matrices see lr x scale.
        betas, eps, weight_decay: as torch.optim.AdamW's, weight decay decoupled.
        seed: seed of the private generators; the global ones are never used.
        share_refreshes: under DistributedDataParallel, let every refresh be computed on one process and sent to the
            others. All processes must hold the same parameters in the same order.

    Raises:
        ValueError: for an unknown method or option, a value that is not valid, or a parameter that cannot be trained.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> groups = [{"params": [model.weight], "rank": 2}, {"params": [model.bias]}]
        >>> optimizer = LowRankOptimizer(groups, "galore_i3s_adamw", lr=1e-2)
    """

    def __init__(
        self,
        params: Iterable[Any],
        method: str = "galore_dominant_adamw",
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        share_refreshes: bool = False,
    ) -> None:
        resolve.split(method)
        if share_refreshes and not (dist.is_available() and dist.is_initialized()):
            raise ValueError("share_refreshes needs torch.distributed to be initialized")
        self.share_refreshes = share_refreshes
        self._begin()
        defaults = {"method": method, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        super().__init__(params, defaults)

    def _begin(self) -> None:
        """Set what lasts from one step to the next and is no state."""
        self.refresh_seconds = 0.0
        self.refreshes_here = 0
        self.projected_grad_norm: float | None = None
        self._held: dict[int, MatrixStep] = {}  # layerwise: projected, waiting for step()
        self._stepped: set[int] = set()  # layerwise: updated in the hook
        self._reported_in: Any = None  # the run whose callback reports on this optimizer
        self._checked: list[dict[str, Any]] = []  # options of every group as they were when last checked
        self._plans: dict[Tensor, Plan] = {}  # of the matrices, for these options

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "share_refreshes": self.share_refreshes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its options checked and completed with the method's defaults."""
        given = {k: v for k, v in param_group.items() if k not in TORCH_KEYS}
        low_rank = "rank" in given
        name = param_group.get("method", self.defaults["method"])
        filled = resolve.complete(name, {"seed": self.defaults["seed"], **given}, low_rank=low_rank)
        method = resolve.split(name)[0]
        super().add_param_group({**param_group, **filled, "method": method, "format": FORMAT_VERSION})
        try:
            check_group(self.param_groups[-1], low_rank)
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Refresh the subspaces that are due, then update every parameter that has a finite gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "grad_scale", None) is not None:
            raise ValueError(
                "layerwise projects gradients before GradScaler has unscaled them: use bf16, or no layerwise"
            )
        with self._without_autocast():
            self._allocate_missing()
            self._check_edits()
            matrices, dense = self._work()
            self._refresh([unit for unit in matrices if unit.R is None and unit.due])
            work: list[step.Unit] = [*matrices, *dense]
            if max_norm := max((group["max_grad_norm"] for group in self.param_groups), default=0.0):
                self.projected_grad_norm = step.clip_(work, max_norm)
            step.update_(work)
            self._refresh([unit for unit in matrices if unit.due_after])
        self._forget_gradients()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard all gradients, also those that the layerwise mode has projected; what it has stepped stays so."""
        super().zero_grad(set_to_none)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        self._held.clear()
        self._stepped.clear()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Have GradScaler announce itself in the layerwise mode, which must refuse it."""
        return any(group["layerwise"] for group in self.param_groups)

    def _without_autocast(self) -> Any:
        devices = (p.device.type for group in self.param_groups for p in group["params"])
        return torch.autocast(next(devices, "cpu"), enabled=False)

    def _check_edits(self) -> None:
        """Check the options of groups that were edited since the last step; a schedule edits lr at every step."""
        rates = [float(group["lr"]) for group in self.param_groups]
        if not all(0 <= rate < inf for rate in rates):
            raise ValueError(f"lr must be in [0, inf), got {rates}")
        plain = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.param_groups]
        if plain != self._checked:
            check_edits(self.param_groups, self._checked)
            self._checked = plain
            self._plans.clear()

    def _refresh(self, due: list[MatrixStep]) -> None:
        if due:
            start = perf_counter()
            self.refreshes_here += step.refresh_(due, share=self.share_refreshes)
            self.refresh_seconds += perf_counter() - start

    def train(self) -> None:
        """Register the hooks of the layerwise mode; Trainer calls it before every step, in your own loop call it once.

        Hooks that another optimizer of ours left on these parameters are removed in any case.

        A hook projects a matrix's gradient during backward and frees it; `step` updates. Methods that need the
        gradient at the write (Fira) update in the hook. A matrix whose refresh is due keeps its gradient until `step`.

        Raises:
            ValueError: under DistributedDataParallel, whose reduction comes after the hooks.
        """
        layerwise.register_hooks(self)

    def eval(self) -> None:
        """Do nothing; Trainer calls it before evaluation."""

    @torch.no_grad()
    def take_gradient(self, g: int, i: int, p: Tensor) -> None:
        """Project (or apply) one matrix's gradient and free it; one whose refresh is due is left for `step`."""
        self._allocate_missing()
        self._check_edits()
        index = self._index(g, i)
        group = self.param_groups[g]
        unit = self._held.get(index) or self._matrix(g, i, p, resolve.parts(group["method"], group))
        in_hook = unit.parts.needs_gradient
        first = unit.s["refreshes"] == 0  # no basis yet: it comes from the first gradient there is
        if unit.due and not first and not in_hook:
            return
        if index in self._stepped:
            raise RuntimeError(
                f"{self.defaults['method']} updates a weight as soon as its gradient is there, and a second one came "
                "before step(): set gradient_accumulation_steps=1, or leave out layerwise"
            )
        with self._without_autocast():
            if unit.due and unit.R is None:
                self._refresh([unit])
            if in_hook:
                step.update_([unit])
                if unit.due_after:
                    self._refresh([unit])
                self._stepped.add(index)
            else:
                alone(unit.project_())
                self._held[index] = unit
        p.grad = None

    def _index(self, g: int, i: int) -> int:
        """Return the place in group order of parameter i of group g."""
        return sum(len(group["params"]) for group in self.param_groups[:g]) + i

    def declared(
        self, options: Sequence[Mapping[str, Any]] | None = None
    ) -> Iterator[tuple[str, Tensor, Parts, Mapping[str, Any]]]:
        """Yield (name, parameter, parts, options) of every parameter in group order; the name is '' if unknown.

        Args:
            options: groups whose options count instead of the present ones.
        """
        for group, chosen in zip(self.param_groups, options or self.param_groups, strict=True):
            parts = resolve.parts(chosen["method"], chosen)
            names = group.get("param_names") or [""] * len(group["params"])
            for name, p in zip(names, group["params"], strict=True):
                yield name, p, parts, chosen

    def declared_bytes(self) -> int:
        """Return the bytes that this process's state takes, known before the first step."""
        declared = (view.stored(*declared_state(p, parts, group, n)) for n, p, parts, group in self.declared())
        return sum(slot.nbytes for stored in declared for slot in stored.values())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, keeping every tensor's stored type.

        Options in the checkpoint win over those given now, with a warning; the method, the rank and the shapes must be
        the same.

        Raises:
            ValueError: if the checkpoint does not fit; nothing has been changed then.
        """
        check_checkpoint(state_dict, self.param_groups)
        given = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        groups = [merge_options(saved, now) for saved, now in zip(state_dict["param_groups"], given, strict=True)]
        loaded = dict(self._load_states(state_dict["state"], groups))
        super().load_state_dict({"state": {}, "param_groups": groups})
        self.state.update(loaded)
        self._forget_gradients()
        for now, old in zip(self.param_groups, given, strict=True):
            warn_changed(now, old)

    def _load_states(
        self, saved_states: Mapping[Any, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield every parameter with its saved state, checked against the declared one."""
        if not saved_states:  # before the first step
            return
        saved_ids = [i for group in groups for i in group["params"]]
        for saved_id, (name, p, parts, group) in zip(saved_ids, self.declared(groups), strict=True):
            saved = {key: whole_if_needed(value, p) for key, value in saved_states.get(saved_id, {}).items()}
            fresh = allocate(p, parts, group, name)
            if difference := view.mismatch(fresh, saved):
                what = name or f"parameter {saved_id}"
                raise ValueError(f"the checkpoint's state of {what} does not fit: {difference}")
            yield p, {key: adopt(saved[key], fresh[key]) for key in fresh}

    def _allocate_missing(self) -> None:
        """Create the state of every parameter that has none, whether or not it has a gradient."""
        if all(self.state.get(p) for group in self.param_groups for p in group["params"]):
            return
        for name, p, parts, group in self.declared():
            if not self.state[p]:
                check_weight(p, parts, group)
                self.state[p] = allocate(p, parts, group, name)

    def _work(self) -> tuple[list[MatrixStep], list[DenseStep]]:
        """Return the units of work of this step."""
        matrices, dense = [], []
        for g, group in enumerate(self.param_groups):
            first = self._index(g, 0)
            with_grad = [(i, p) for i, p in enumerate(group["params"]) if _has_gradient(p) or first + i in self._held]
            parts = resolve.parts(group["method"], group)
            if "rank" in group:
                matrices += [self._held.get(first + i) or self._matrix(g, i, p, parts) for i, p in with_grad]
                continue
            for mesh in dict.fromkeys(getattr(p, "device_mesh", None) for _, p in with_grad):
                some = [(first + i, p) for i, p in with_grad if getattr(p, "device_mesh", None) == mesh]
                weights = [p for _, p in some]
                dense.append(DenseStep(weights, [self.state[p] for p in weights], parts, group, [i for i, _ in some]))
        return matrices, dense

    def _matrix(self, g: int, i: int, p: Tensor, parts: Parts) -> MatrixStep:
        group = self.param_groups[g]
        interval = None
        if group.get("stagger") and self.state[p]["refreshes"] == 0:
            world = step.team(getattr(p, "device_mesh", None), share=self.share_refreshes)[1]
            costs = [refresh_cost(q) for q in group["params"]]
            interval = staggered_intervals(costs, group["update_proj_gap"], world)[i]
        if p not in self._plans:
            name = group["param_names"][i] if group.get("param_names") else ""
            self._plans[p] = Plan.of(p, parts, group, name)
        return MatrixStep(p, self.state[p], parts, group, self._index(g, i), self._plans[p], interval)


def _has_gradient(p: Tensor) -> bool:
    if p.grad is None:
        return False
    if p.grad.layout != torch.strided:
        raise ValueError("sparse gradients are not supported; build the embedding with sparse=False")
    return True
