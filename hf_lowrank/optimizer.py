"""LowRankOptimizer: parameter groups, the step, checkpoints."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from time import perf_counter
from typing import Any, overload

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.engine import refresh, step
from hf_lowrank.engine.ahead import Ahead
from hf_lowrank.engine.checkpoint import FORMAT_VERSION, check_checkpoint, load_states, merge_options, warn_changed
from hf_lowrank.engine.checks import (
    TORCH_KEYS,
    check_given_once,
    check_materialized,
    check_method,
    check_numbers,
    check_parameters,
    check_together,
    config_of,
    doubts,
)
from hf_lowrank.engine.edits import Resolved
from hf_lowrank.engine.known import named_groups, resolved
from hf_lowrank.engine.layerwise import Layerwise
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.engine.ownership import check_shardable
from hf_lowrank.engine.plan import Plan
from hf_lowrank.engine.replicas import Replicas
from hf_lowrank.engine.stacks import gathered
from hf_lowrank.engine.unit import Unit
from hf_lowrank.engine.work import Declared, Work, declared, first_intervals, forget
from hf_lowrank.methods.registry import Gauge
from hf_lowrank.methods.resolve import Config, split


USUAL = "galore_dominant_adamw"
"""The method where nothing names one."""


class LowRankOptimizer(Replicas):
    """Trains every parameter, with the moments of the matrices kept in a subspace of their gradient.

    A group with the key `rank` holds matrices and is low-rank; one without is dense and takes the same rule with no
    subspace, or another that its key `dense` names. Other options of the method (methods.common.LowRankOptions and the
    fields of its parts) are keys of the group. The values of a group may be edited while training; keys that are no
    option, which a schedule puts there, are left alone.

    Args:
        params: parameters or groups, as for any torch optimizer; `param_groups` makes them from a model.
        method: a name from METHODS for the groups that name none, by default "galore_dominant_adamw".
        lr: learning rate; the matrices see it times `Reconstruction.rate(scale)`, which is scale for most.
        betas, eps, weight_decay: as torch.optim.AdamW's, weight decay decoupled.
        seed: seed of the private generators; the global ones are never used.
        share_refreshes: under DistributedDataParallel, compute every refresh on one process and send it to the others,
            which must hold the same parameters in the same order.
        shard_state: under DistributedDataParallel, let one process keep the state of each parameter, refresh it and
            step it, and send the weight to the others (`consolidate_state_dict`).

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
        method: str = "",
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        share_refreshes: bool = False,
        shard_state: bool = False,
    ) -> None:
        given, method = method, USUAL if method == "" else method
        split(method)
        self._share(refreshes=share_refreshes, state=shard_state)
        self._begin()
        defaults = {"method": method, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        super().__init__(params, defaults)
        if shard_state:
            check_shardable(self.param_groups)
        if given:
            check_method(given, self.configs)
        for text in doubts(self.param_groups, self.configs):
            warnings.warn(text, stacklevel=2)

    def __new__(cls, *args: Any, **kwargs: Any) -> LowRankOptimizer:
        """Refuse, by a TypeError, groups of one's own beside those that Trainer has split."""
        check_given_once(args, kwargs)
        return super().__new__(cls)

    def _begin(self) -> None:
        """Set what lasts from one step to the next and is no state."""
        self.refresh_seconds = 0.0
        self.refreshes_here = 0
        self.projected_grad_norm: float | None = None
        self.grad_norm: float | None = None  # of whole gradients, where those are clipped here
        self.norm_of_trainer: float | None = None  # what max_grad_norm was taken to be from its arguments
        self.layerwise = Layerwise()
        self._ahead = Ahead()
        self._reported_in: Any = None  # the run whose callback reports on this optimizer
        self._facts: dict[str, Any] = getattr(self, "_facts", {})  # of the run, as they were told; a copy has them
        self._work: Work | None = None  # on the state and options as they are
        self._resolved = Resolved()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "layerwise" not in self.__dict__:  # a copy; a load begins nothing anew
            self._begin()
            self._resolved.configs(self.param_groups)  # as they are now, before anybody edits them

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_facts": self._facts}

    # ---- groups -----------------------------------------------------------------------------------------------------

    @property
    def configs(self) -> list[Config]:
        """What every group is resolved to, as it was when last looked at."""
        return self._resolved.configs(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its options checked and completed with the method's defaults.

        Parameters without names, beside others that `param_groups` has named, have its options for them.
        """
        if isinstance(param_group, dict) and "params" not in param_group:
            raise ValueError(f"a group needs its parameters under 'params'; this one has {', '.join(param_group)}")
        for group in named_groups(param_group, self.param_groups):
            self._add(group)

    def _add(self, param_group: dict[str, Any]) -> None:
        """Add one group as it is."""
        given = {"seed": self.defaults["seed"], **{k: v for k, v in param_group.items() if k not in TORCH_KEYS}}
        name, known = param_group.get("method", self.defaults["method"]), self.configs
        config = resolved(param_group, given) or Config.of(name, given, low_rank="rank" in given)
        super().add_param_group({**param_group, **config.options, "method": config.method, "format": FORMAT_VERSION})
        try:
            check_numbers(self.param_groups[-1])
            check_parameters(self.param_groups[-1], config)
        except ValueError:
            self.param_groups.pop()
            raise
        self._resolved.take(self.param_groups, [*known, config])
        self.tell(**self._facts)

    def tell(self, **facts: Any) -> None:
        """Set the options that are a fact of the run, such as total_steps, where a method has them, now or later."""
        self._facts |= facts
        for group, config in zip(self.param_groups, self.configs, strict=True):
            group.update({key: facts[fact] for key, fact in config.facts.items() if fact in facts})

    def gauges(self) -> dict[str, Gauge]:
        """Return what the methods of all groups leave for the log: in the state of every matrix, by these names."""
        return {name: gauge for config in self.configs if config.low_rank for name, gauge in config.gauges.items()}

    @override
    def declared(self) -> Iterator[Declared]:
        return declared(self.param_groups, self.configs)

    def plan(self, p: Tensor) -> Plan:
        """Return what is known of a parameter: how it lies, and what its state is."""
        if self._work is not None and p in self._work.plans:
            return self._work.plans[p]
        return next(one.plan for one in self.declared() if one.weight is p)

    def forget(self, params: Iterable[Tensor]) -> None:
        """Drop the state of some parameters but for counters: trained again, they get new moments and bases.

        What the layerwise mode has projected of their gradients goes with the bases.
        """
        params = set(params)
        self._ahead.settle()
        self._work = None
        self.layerwise.drop(params)
        forget(self.state, self.declared(), params)

    # ---- the step ---------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Refresh the subspaces that are due, then update every parameter that has a finite gradient."""
        loss: float | None = self._step(closure)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator,unused-ignore]  # nothing in it is worth a graph
    @torch.no_grad()
    def _step(self, closure: Callable[[], float] | None) -> float | None:
        """`step`; by itself, since torch 2.6 loses `self` where the method that is compiled is the disabled one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if hasattr(self, "found_inf"):  # GradScaler sets it, whether or not it has unscaled before
            for left in ("found_inf", "grad_scale"):  # where a step fails
                vars(self).pop(left, None)
            raise ValueError(
                "GradScaler finds no gradients to unscale: use bf16, or no layerwise and no reduce_projected"
            )
        work, self._whole = self._prepared(), None
        self._agree(work)
        max_norm = max((group["max_grad_norm"] for group in self.param_groups), default=0.0)
        with work.stepping(self.layerwise):
            self.grad_norm = self.layerwise.step_offloaded_(work.offloaded, self._refresh, max_norm)
            self.layerwise.average_due_(work.matrices, self._refresh)
            units = sorted((unit for unit in work.units if unit.ready), key=lambda unit: unit.local)
            matrices = [unit for unit in units if isinstance(unit, MatrixStep)]
            flags = step.foreseen(units)
            self._refresh([u for u in matrices if u.started is None and not u.local and u.due(after=False)], flags)
            if max_norm and not work.offloaded:
                elsewhere = float if self.owners is None else self.owners.summed
                self.projected_grad_norm = step.clip_(units, max_norm, elsewhere)
            step.update_(gathered(units, work.stacks, flags), flags)
            self._agree_again(work)
            self._refresh([u for u in matrices if u.due(after=True)], flags)
            self._ahead.adopt_(work.matrices)
            if self.owners is not None:
                self.owners.send_(work.plans)
        return loss

    def _refresh(self, due: Sequence[MatrixStep], flags: Mapping[Unit, Sequence[bool]]) -> None:
        if due:
            start, share = perf_counter(), self.share_refreshes or any(unit.reduced for unit in due)
            now = [unit for unit in due if not unit.ahead]
            self.refreshes_here += self._ahead.begin_([unit for unit in due if unit.ahead], flags)
            intervals = first_intervals(now, self.param_groups, self.configs, share=share or self.shard_state)
            self.refreshes_here += refresh.refresh_(now, intervals, flags, share=share)
            self.refresh_seconds += perf_counter() - start

    @override
    def _prepared(self, p: Tensor | None = None) -> Work:
        """Look at the groups again, and at the state of all parameters or of one; return the steps of all."""
        work = self._work
        again = p is None or not self.layerwise.begun  # once for all hooks of a backward pass
        changed = again and self._resolved.look(self.param_groups, self.state if work is None else work.plans)
        if work is None or changed or not work.holds(self.state, work.plans if p is None else (p,)):
            self._ahead.settle()
            self._work = None
            check_together(self.param_groups, self.configs)
            check_materialized(self.param_groups)
            work = self._work = Work(self.param_groups, self.configs, self.state, self._owned())
            self.layerwise.hand_over(work.by_weight)
        return work

    # ---- the layerwise mode -----------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard all gradients, also those that the layerwise mode has projected; what it has stepped stays so."""
        super().zero_grad(set_to_none)
        self.layerwise.forget(self._work.units if self._work else ())

    def train(self) -> None:
        """Register the hooks of the layerwise mode; Trainer calls it before every step, in your own loop call it once.

        A hook projects a matrix's gradient during backward and frees it; `step` updates. Methods that need the
        gradient at the write (Fira, all without a subspace) update in the hook, dense parameters too. A matrix whose
        refresh is due, other than its first, keeps its gradient until `step`. With layerwise=offload all gradients
        wait in host memory, whatever the method, and `step` has them one at a time. Hooks of another optimizer of ours
        are removed.

        Raises:
            ValueError: under DistributedDataParallel, unless `exclude_from_ddp` came before.
        """
        self.layerwise.attach(self.param_groups, self.configs, self.take_gradient)

    def eval(self) -> None:
        """Do nothing; Trainer calls it before evaluation."""

    def remove_hooks(self) -> None:
        """Take the hooks of the layerwise mode off the parameters."""
        self.layerwise.detach()

    @torch.no_grad()
    def take_gradient(self, p: Tensor) -> None:
        """Project (or apply) a gradient and free it, unless it is left for `step`: see `train`."""
        unit = self._prepared(p).by_weight.get(p)
        if unit is None or not unit.ready:
            return
        with torch.autocast(p.device.type, enabled=False):
            if isinstance(unit, MatrixStep):
                self.layerwise.take_(unit, self._refresh)
            else:
                self.layerwise.take_dense_(unit)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, keeping every tensor's stored type.

        Its options win over those given now, with a warning; the method, the rank and the shapes must be the same.

        Raises:
            ValueError: if the checkpoint does not fit; nothing has been changed then.
        """
        self._ahead.settle()
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict  # a hook may edit it
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        check_checkpoint(state_dict, self.param_groups)
        given = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        groups = [
            merge_options(deepcopy(saved), now, config)
            for saved, now, config in zip(state_dict["param_groups"], given, self.configs, strict=True)
        ]
        configs = [config_of(group) for group in groups]
        known = list(declared(self.param_groups, configs))
        states = load_states(state_dict["state"], state_dict["param_groups"], known)
        loaded = dict(states if self.owners is None else self.owners.taken(known, states))
        for group, present in zip(groups, self.param_groups, strict=True):
            group["params"] = present["params"]
        self.__setstate__({"state": defaultdict(dict, loaded), "param_groups": groups})
        self._whole = self._work = None
        self._resolved.take(self.param_groups, configs)
        self.layerwise.forget()
        warn_changed(zip(self.param_groups, given, configs, strict=True))
        for loaded_hook in self._optimizer_load_state_dict_post_hooks.values():
            loaded_hook(self)
