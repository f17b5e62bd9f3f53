"""LowRankOptimizer: groups, the step, state, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hf_lowrank import distributed, layerwise, linalg, methods, state
from hf_lowrank.allocation import adopt, allocate, check_weight, declared_state, whole_if_needed
from hf_lowrank.checks import TORCH_KEYS, check_checkpoint, check_edits, check_group, merge_options, warn_changed
from hf_lowrank.dense import DenseStep
from hf_lowrank.methods import Parts
from hf_lowrank.state import FORMAT_VERSION
from hf_lowrank.steps import MatrixStep, refresh_cost, staggered_intervals


SYNC_ELEMENTS = 2**26
"""Elements of projected gradients in one bucket on an accelerator, where many matrices share one finite check. Their
moments, if decoded, and directions come on top."""

Unit = MatrixStep | DenseStep


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
        methods.split(method)
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
        filled = methods.complete(name, {"seed": self.defaults["seed"], **given}, low_rank=low_rank)
        method = methods.split(name)[0]
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
            work: list[Unit] = [*matrices, *dense]
            if max_norm := max((group["max_grad_norm"] for group in self.param_groups), default=0.0):
                self._clip(work, max_norm)
            for bucket in _buckets(work):
                self._update(bucket)
        self._forget_gradients()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard all gradients, also those that the layerwise mode has projected already."""
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
        """Check the options of groups that were edited since the last step."""
        plain = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in self.param_groups]
        if plain != self._checked:
            check_edits(self.param_groups, self._checked)
            self._checked = plain

    def _refresh(self, due: list[MatrixStep]) -> None:
        """Choose new bases, each on one process where the work is shared, and carry the moments over."""
        start = perf_counter()
        for mesh in dict.fromkeys(unit.mesh for unit in due):
            units = [unit for unit in due if unit.mesh == mesh]
            rank, world = self._team(mesh)
            owner = distributed.owners([unit.cost for unit in units], world)
            for wave in distributed.waves(units, owner):
                for unit, chooser in wave:
                    unit.collect_(chooser)
                for unit, chooser in wave:
                    if chooser == rank:
                        unit.choose_()
                        self.refreshes_here += 1
                for unit, chooser in wave:
                    unit.adopt_(chooser, None if world == 1 else self._group(mesh))
        self.refresh_seconds += perf_counter() - start

    def _update(self, bucket: list[Unit]) -> None:
        """Update moments and weights; under FSDP2 all flags travel in one collective, and so do all sums."""
        mesh = bucket[0].mesh
        readings = [unit.measure() for unit in bucket]
        flags = linalg.all_finite([x for reading in readings for x in reading])
        if mesh is not None:
            flags = distributed.all_true(flags, mesh.get_group(), bucket[0].device)
        finite = iter(flags)
        sums = [unit.begin_([next(finite) for _ in reading]) for unit, reading in zip(bucket, readings, strict=True)]
        if mesh is not None and (asked := [total for total in sums if total is not None]):
            totals = iter(distributed.sum_together(asked, mesh.get_group()))
            sums = [None if total is None else next(totals) for total in sums]
        for unit, total in zip(bucket, sums, strict=True):
            unit.finish_(total)

    def _team(self, mesh: Any) -> tuple[int, int]:
        """Return (rank, world size) of the processes that share the refreshes of a weight on this mesh."""
        if mesh is None and not self.share_refreshes:
            return 0, 1
        group = self._group(mesh)
        return dist.get_rank(group), dist.get_world_size(group)

    def _group(self, mesh: Any) -> Any:
        return dist.group.WORLD if mesh is None else mesh.get_group()

    def _clip(self, work: list[Unit], max_norm: float) -> None:
        """Scale all gradients by the global norm of the projected ones and of the dense ones.

        For methods whose step depends on the projected gradient alone this is exact clipping of what they see.
        """
        total = 0.0
        for mesh in dict.fromkeys(unit.mesh for unit in work):
            readings = [x for unit in work if unit.mesh == mesh for x in unit.measure()]
            finite = linalg.all_finite(readings)  # one that is not skips its parameter, and counts for nothing here
            squares = [linalg.sum_of_squares(x).double() for x, good in zip(readings, finite, strict=True) if good]
            share = sum(
                (square.to(readings[0].device) for square in squares), torch.zeros((), device=readings[0].device)
            )
            if mesh is not None:
                (share,) = distributed.sum_together([share.double()], mesh.get_group())
            total += float(share)
        self.projected_grad_norm = total**0.5
        for unit in work:
            for x in unit.measure():
                x.mul_(min(1.0, max_norm / (self.projected_grad_norm + 1e-6)))

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
        index = self._index(g, i)
        unit = self._held.get(index) or self._matrix(g, i, p)
        first = unit.s["refreshes"] == 0  # no basis yet: it comes from the first gradient there is
        if unit.due and not first:
            return
        if index in self._stepped:
            raise RuntimeError(
                f"{self.defaults['method']} updates a weight as soon as its gradient is there, and a second one came "
                "before step(): set gradient_accumulation_steps=1, or leave out layerwise"
            )
        with self._without_autocast():
            if first and unit.R is None:
                self._refresh([unit])
            if unit.parts.reconstruction.needs_gradient:
                self._update([unit])
                self._stepped.add(index)
            else:
                unit.project_()
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
            parts = methods.parts(chosen["method"], chosen)
            names = group.get("param_names") or [""] * len(group["params"])
            for name, p in zip(names, group["params"], strict=True):
                yield name, p, parts, chosen

    def declared_bytes(self) -> int:
        """Return the bytes that this process's state takes, known before the first step."""
        declared = (state.stored(*declared_state(p, parts, group)) for _, p, parts, group in self.declared())
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
            fresh = allocate(p, parts, group)
            if difference := state.mismatch(fresh, saved):
                what = name or f"parameter {saved_id}"
                raise ValueError(f"the checkpoint's state of {what} does not fit: {difference}")
            yield p, {key: adopt(saved[key], fresh[key]) for key in fresh}

    def _allocate_missing(self) -> None:
        """Create the state of every parameter that has none, whether or not it has a gradient."""
        if all(self.state.get(p) for group in self.param_groups for p in group["params"]):
            return
        for _, p, parts, group in self.declared():
            if not self.state[p]:
                check_weight(p, parts, group)
                self.state[p] = allocate(p, parts, group)

    def _work(self) -> tuple[list[MatrixStep], list[DenseStep]]:
        """Return the units of work of this step."""
        matrices, dense = [], []
        for g, group in enumerate(self.param_groups):
            first = self._index(g, 0)
            with_grad = [(i, p) for i, p in enumerate(group["params"]) if _has_gradient(p) or first + i in self._held]
            if "rank" in group:
                matrices += [self._held.get(first + i) or self._matrix(g, i, p) for i, p in with_grad]
                continue
            parts = methods.parts(group["method"], group)
            for mesh in dict.fromkeys(getattr(p, "device_mesh", None) for _, p in with_grad):
                some = [(first + i, p) for i, p in with_grad if getattr(p, "device_mesh", None) == mesh]
                weights = [p for _, p in some]
                dense.append(DenseStep(weights, [self.state[p] for p in weights], parts, group, [i for i, _ in some]))
        return matrices, dense

    def _matrix(self, g: int, i: int, p: Tensor) -> MatrixStep:
        group = self.param_groups[g]
        interval = group["update_proj_gap"]
        if group["stagger"] and self.state[p]["refreshes"] == 0:
            world = self._team(getattr(p, "device_mesh", None))[1]
            interval = staggered_intervals([refresh_cost(q) for q in group["params"]], interval, world)[i]
        parts = methods.parts(group["method"], group)
        return MatrixStep(p, self.state[p], parts, group, self._index(g, i), interval)


def _has_gradient(p: Tensor) -> bool:
    if p.grad is None:
        return False
    if p.grad.layout != torch.strided:
        raise ValueError("sparse gradients are not supported; build the embedding with sparse=False")
    return True


def _buckets(work: list[Unit]) -> Iterator[list[Unit]]:
    """Split the work: one unit at a time on the CPU, as many as SYNC_ELEMENTS allow where a finite check makes the
    host wait or processes talk.
    """
    bucket: list[Unit] = []
    for unit in work:
        if bucket and unit.mesh != bucket[0].mesh:
            yield bucket
            bucket = []
        bucket.append(unit)
        alone = unit.device.type == "cpu" and unit.mesh is None
        if alone or sum(x.transient for x in bucket) >= SYNC_ELEMENTS:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
