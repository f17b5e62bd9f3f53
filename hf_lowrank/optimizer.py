"""LowRankOptimizer: groups, the step, state, checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf, nan
from time import perf_counter
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lowrank import linalg, methods, state
from hf_lowrank.state import FORMAT_VERSION, Slots
from hf_lowrank.steps import DenseStep, MatrixStep, dense_slots, matrix_slots, refresh_cost, staggered_intervals


SYNC_ELEMENTS = 2**26
"""Elements of projected gradients held at once on an accelerator, where many matrices share one finite check."""

_TORCH_KEYS = {"params", "param_names", "lr", "betas", "eps", "weight_decay", "name", "initial_lr"}
_STRUCTURE = ("method", "rank", "proj_type", "subspace", "moments", "reconstruction")


class LowRankOptimizer(Optimizer):
    """Trains every parameter, with the moments of the matrices kept in a subspace of their gradient.

    A group with the key `rank` holds matrices and is low-rank; one without is dense and takes the same rule with no
    subspace. Other options of the method (methods.LowRankOptions and the fields of its parts) are keys of the group.
    The values of a group may be edited while training.

    Args:
        params: parameters or groups, as for any torch optimizer; `param_groups` makes them from a model.
        method: a name from METHODS.
        lr: learning rate; the matrices see lr x scale.
        betas, eps, weight_decay: as torch.optim.AdamW's, weight decay decoupled.
        seed: seed of the private generators; the global ones are never used.

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
    ) -> None:
        methods.find(method)
        self.refresh_seconds = 0.0
        defaults = {"method": method, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its options checked and completed with the method's defaults."""
        given = {k: v for k, v in param_group.items() if k not in _TORCH_KEYS | {"method", "format"}}
        low_rank = "rank" in given
        method = param_group.get("method", self.defaults["method"])
        filled = methods.complete(method, {"seed": self.defaults["seed"], **given}, low_rank=low_rank)
        super().add_param_group({**param_group, **filled, "method": method, "format": FORMAT_VERSION})
        try:
            _check_group(self.param_groups[-1], low_rank)
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
        self._allocate_missing()
        work = list(self._work())
        start = perf_counter()
        for unit in work:
            if unit.due:
                unit.refresh_()
        self.refresh_seconds += perf_counter() - start
        for bucket in _buckets(work):
            readings = [unit.measure() for unit in bucket]
            finite = iter(linalg.all_finite([x for reading in readings for x in reading]))
            for unit, reading in zip(bucket, readings, strict=True):
                unit.apply_([next(finite) for _ in reading])
        return loss

    def declared(self, options: Sequence[Mapping[str, Any]] | None = None) -> Iterator[tuple[str, Tensor, Slots]]:
        """Yield (name, parameter, declared state) of every parameter in group order; the name is '' if unknown.

        Args:
            options: groups whose options count instead of the present ones.
        """
        for group, chosen in zip(self.param_groups, options or self.param_groups, strict=True):
            parts = methods.parts(chosen["method"], chosen)
            names = group.get("param_names") or [""] * len(group["params"])
            for name, p in zip(names, group["params"], strict=True):
                yield name, p, matrix_slots(parts, p.shape, chosen) if "rank" in group else dense_slots(parts, p.shape)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer, keeping every tensor's stored type.

        Options in the checkpoint win over those given now, with a warning; the method, the rank and the shapes must be
        the same.

        Raises:
            ValueError: if the checkpoint does not fit; nothing has been changed then.
        """
        self._check_groups(state_dict)
        loaded = dict(self._load_states(state_dict))
        before = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(loaded)
        for now, old in zip(self.param_groups, before, strict=True):
            _warn_changed(now, old)

    def _load_states(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield every parameter with its saved state, checked against the declared one."""
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        declared = self.declared(state_dict["param_groups"])
        for saved_id, (name, p, slots) in zip(saved_ids, declared, strict=True):
            saved = state_dict["state"].get(saved_id)
            if not saved:
                continue
            if difference := state.mismatch(slots, saved):
                what = name or f"parameter {saved_id}"
                raise ValueError(f"the checkpoint's state of {what} does not fit: {difference}")
            yield p, {key: saved[key].detach().to(slot.device(p), copy=True) for key, slot in slots.items()}

    def _check_groups(self, state_dict: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another optimizer, method or structure."""
        saved_groups = state_dict.get("param_groups", [])
        if any("format" not in group or "method" not in group for group in saved_groups):
            keys = sorted({k for s in state_dict.get("state", {}).values() for k in s})
            raise ValueError(
                "this checkpoint was written by another optimizer, not by hf_lowrank (its state holds: "
                f"{', '.join(map(str, keys)) or 'nothing'}). Resume with the optimizer that wrote it, or start from "
                "its weights alone."
            )
        if any(group["format"] > FORMAT_VERSION for group in saved_groups):
            raise ValueError("this checkpoint was written by a newer hf_lowrank; upgrade to read it")
        if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in self.param_groups]:
            raise ValueError(
                "the checkpoint's parameter groups hold "
                f"{[len(g['params']) for g in saved_groups]} parameters, this optimizer's "
                f"{[len(g['params']) for g in self.param_groups]}: another model, rank or set of target modules"
            )
        for saved, now in zip(saved_groups, self.param_groups, strict=True):
            for key in _STRUCTURE:
                if saved.get(key) != now.get(key):
                    raise ValueError(f"the checkpoint has {key}={saved.get(key)}, this optimizer {key}={now.get(key)}")

    def _allocate_missing(self) -> None:
        """Create the state of every parameter that has none, whether or not it has a gradient."""
        if all(p in self.state for group in self.param_groups for p in group["params"]):
            return
        for _, p, slots in self.declared():
            if not self.state[p]:
                self.state[p] = state.allocate(slots, p)

    def _work(self) -> Iterator[MatrixStep | DenseStep]:
        """Yield the units of work of this step."""
        index = 0
        for group in self.param_groups:
            parts = methods.parts(group["method"], group)
            indexed = [(index + i, p) for i, p in enumerate(group["params"])]
            index += len(indexed)
            if "rank" in group:
                intervals = _first_intervals(group)
                for (i, p), interval in zip(indexed, intervals, strict=True):
                    if p.grad is not None:
                        yield MatrixStep(p, _dense_grad(p), self.state[p], parts, group, i, interval)
            elif with_grad := [(i, p) for i, p in indexed if p.grad is not None]:
                indices, weights = [i for i, _ in with_grad], [p for _, p in with_grad]
                states = [self.state[p] for p in weights]
                yield DenseStep(weights, [_dense_grad(p) for p in weights], states, parts, group, indices)


def _buckets(work: list[Any]) -> Iterator[list[Any]]:
    """Split the work: one unit at a time on the CPU, as many as SYNC_ELEMENTS allow where a finite check makes the
    host wait.
    """
    bucket: list[Any] = []
    held = 0
    for unit in work:
        on_host = all(x.device.type == "cpu" for x in (unit.weights if isinstance(unit, DenseStep) else [unit.weight]))
        bucket.append(unit)
        held += unit.transient
        if on_host or held >= SYNC_ELEMENTS:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket


def _first_intervals(group: Mapping[str, Any]) -> list[int]:
    gap = group["update_proj_gap"]
    if not group["stagger"]:
        return [gap] * len(group["params"])
    return staggered_intervals([refresh_cost(p) for p in group["params"]], gap)


def _dense_grad(p: Tensor) -> Tensor:
    grad = p.grad
    assert grad is not None
    if grad.layout != torch.strided:
        raise ValueError("sparse gradients are not supported; build the embedding with sparse=False")
    return grad


def _check_group(group: Mapping[str, Any], low_rank: bool) -> None:
    """Refuse values and parameters that cannot be trained."""
    betas = group["betas"]
    beta1, beta2 = betas if isinstance(betas, (tuple, list)) and len(betas) == 2 else (nan, nan)
    for name, value, below in (
        ("lr", group["lr"], inf),
        ("eps", group["eps"], inf),
        ("weight_decay", group["weight_decay"], inf),
        ("betas", beta1, 1.0),
        ("betas", beta2, 1.0),
    ):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = nan
        if not 0 <= number < below:
            raise ValueError(f"{name} must be in [0, {below:g}), got {group[name]!r}")
    for i, p in enumerate(group["params"]):
        name = group["param_names"][i] if "param_names" in group else f"of shape {tuple(p.shape)}"
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"parameter {name} is {p.dtype}; train it in float32, bfloat16 or float16, or freeze it")
        if low_rank and (p.dim() not in (2, 3) or 0 in p.shape):
            raise ValueError(
                f"parameter {name} has shape {tuple(p.shape)}; only matrices and stacks of matrices are projected. "
                "Put it in a group without 'rank'. (FSDP1 and ZeRO flatten parameters: use FSDP2.)"
            )


def _warn_changed(loaded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Warn about options that differ from the checkpoint's; the schedule's lr aside."""
    for key in sorted(set(loaded) & set(given) - {"lr", "param_names", "params"}):
        if loaded[key] != given[key]:
            warnings.warn(
                f"{key}={given[key]} was given, the checkpoint has {loaded[key]}: the checkpoint's value is used",
                stacklevel=3,
            )
