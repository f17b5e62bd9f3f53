"""A new basis for one matrix: what the rule looks at is collected, one process chooses, and all adopt the basis."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.engine import collectives
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import kernels
from hf_lowrank.tensors.bases import Basis
from hf_lowrank.tensors.layout import sharded
from hf_lowrank.tensors.sums import Summing


UNKNOWN = -1.0
"""Entry of a report that the rule does not know."""


class Refresh:
    """A refresh of one matrix; the engine calls `collect_`, `choose_` (on one process) and `adopt_`.

    Args:
        unit: the matrix.
        owner: the process that chooses.
    """

    def __init__(self, unit: MatrixStep, owner: int) -> None:
        self.unit, self.owner = unit, owner
        self.whole: Tensor | None = None  # what the rule looks at, on the process that chooses
        self.new: dict[str, Tensor] = {}  # the basis on its way in
        self.wanted: dict[str, Tensor] = {}  # moments that the rule looks at
        self.changes: list[Tensor] = []  # from the basis before to the new one, where this process knows them

    def collect_(self) -> Summing[None]:
        """Bring what the rule looks at to the process that chooses, and a copy of the whole basis to all."""
        unit, subspace, s = self.unit, self.unit.parts.subspace, self.unit.s
        ctx, gradient = unit.context(refreshing=True), unit.gradient
        G, _ = yield from unit.summed(unit.parts.reconstruction.absorb(s, gradient, ctx))
        evidence = subspace.evidence(s, G, ctx)
        # where the step projects just this, the energy in the new basis is had from that
        self.later = evidence is gradient and not unit.layout.along and not unit.due_after and s.plain("basis")
        self.whole = unit.layout.whole(evidence, self.owner)
        self.new = {name: self._whole_stack(s[name]).clone() for name in s.names("basis")}
        self.wanted = {name: self._whole_moment(s[name]) for name in subspace.wants}
        # whether the basis changes, then the report, with ||G||^2 in the place of an energy that comes later
        self.choice = torch.tensor([0.0, UNKNOWN, UNKNOWN, UNKNOWN], device=unit.device)

    def choose_(self) -> None:
        """Choose a new basis from the whole gradient, unless that is zero or not finite."""
        G, self.whole = self.whole, None
        assert G is not None
        total = kernels.squared_norm(G)  # (...)
        live = total > 0
        if not bool(torch.isfinite(total.sum()) & live.any()):
            return
        subspace, ctx = self.unit.parts.subspace, self.unit.context(refreshing=True)
        dead, split = not bool(live.all()), self.unit.layout.along == "batch"
        old = {name: tensor.clone() for name, tensor in self.new.items()} if dead or split else {}
        s = ChainMap(self.new, self.wanted, self.unit.s)  # type: ignore[arg-type]
        sigma = subspace.refresh_(s, G, ctx)
        if dead:  # a slice of zeros (an expert that saw no token) keeps its basis
            for name, tensor in old.items():
                keep = live[(...,) + (None,) * (tensor.dim() - live.dim())]
                self.new[name].copy_(torch.where(keep, self.new[name], tensor))
        basis = subspace.basis(s, ctx)
        overlap = unknown = torch.tensor(UNKNOWN)
        if ctx.number and subspace.orthonormal:
            before = subspace.basis(ChainMap(old, self.unit.s), self.unit.context(number=ctx.number - 1))  # type: ignore[arg-type]
            changes = basis.changes(before)
            overlap = kernels.overlap(changes[0])
            self.changes = [] if split else changes
        energy = self._energy(basis, G, total.sum()) if subspace.orthonormal else unknown
        stable_rank = unknown if sigma is None else _stable_rank(total, sigma, live)
        report = [x.to(self.choice) for x in (torch.ones(()), overlap, energy, stable_rank)]
        self.choice.copy_(torch.stack(report))

    def _energy(self, basis: Basis, G: Tensor, total: Tensor) -> Tensor:
        """Return the share of ||G||^2 inside the basis, or ||G||^2 if the step is to report it."""
        return total if self.later else kernels.squared_norm(basis.project(G)).sum() / total

    def adopt_(self, group: Any) -> None:
        """Take over the basis that the owner chose, if it did, and carry the moments into it."""
        if group is not None:
            collectives.broadcast_([self.choice, *self.new.values()], self.owner, group)
        changed, overlap, energy, stable_rank = self.choice.tolist()
        if not changed:
            return
        unit, layout, subspace = self.unit, self.unit.layout, self.unit.parts.subspace
        new, s, ctx = self.new, unit.s, unit.context(refreshing=True)
        if layout.along == "batch":
            new = {name: x.narrow(0, layout.offset, layout.stack[0]) for name, x in new.items()}
        if ctx.number:
            self._carry_over_(new)
        for name, tensor in new.items():
            s[name].copy_(tensor)
        s.commit("basis", "moment", "variance")
        if self.later and subspace.orthonormal:
            unit.total, energy = self.choice[2], UNKNOWN
        s["report"].copy_(torch.tensor([overlap, energy, stable_rank]))
        interval = subspace.adopted_(s, unit.group.get("update_proj_gap", 1), overlap)
        s.commit("exact")
        unit.basis, unit.observed = None, True
        self.new, self.wanted = {}, {}
        self._schedule_next(interval)

    def _carry_over_(self, new: Mapping[str, Tensor]) -> None:
        """Carry the moments from the basis in use into the new one."""
        unit, s, rules = self.unit, self.unit.s, self.unit.parts
        ctx, how = unit.context(refreshing=True), unit.group.get("on_refresh", "keep")
        before = rules.subspace.basis(s, unit.context(number=ctx.number - 1))
        after = rules.subspace.basis(ChainMap(new, s), ctx)  # type: ignore[arg-type]
        unit.basis = before
        rules.reconstruction.moved_(s, lambda: rules.moments.momentum(s), unit.add_product_, 1.0, ctx)
        for C, side in zip(self.changes or after.changes(before), (s, _Turned(s)), strict=False):
            rules.moments.transport_(side, C, how, ctx)
        unit.basis = after
        rules.reconstruction.moved_(s, lambda: rules.moments.momentum(s), unit.add_product_, -1.0, ctx)

    def _whole_stack(self, tensor: Tensor) -> Tensor:
        """Return a basis for all matrices of a stack that is split over processes."""
        layout = self.unit.layout
        if layout.along != "batch":
            return tensor
        return sharded(tensor.contiguous(), layout.mesh, 0, layout.batch[0]).full_tensor()

    def _whole_moment(self, tensor: Tensor) -> Tensor:
        """Return a moment as a whole."""
        layout = self.unit.layout
        if layout.summed:
            return sharded(tensor.contiguous(), layout.mesh, tensor.dim() - 1, layout.n).full_tensor()
        return self._whole_stack(tensor)

    def _schedule_next(self, interval: int) -> None:
        s = self.unit.s
        first = None if s["refreshes"] else self.unit.first_interval
        s["refresh_at"].add_(interval if first is None else first)
        while s["refresh_at"] <= s["step"]:  # it came late
            s["refresh_at"].add_(interval)
        s["refreshes"].add_(1)


class _Turned(Mapping[str, Tensor]):
    """The state of a matrix with its moments transposed, for the basis of the right side."""

    def __init__(self, s: State) -> None:
        self.s = s

    def __getitem__(self, name: str) -> Tensor:
        value = self.s[name]
        return value.mT if value.dim() > 1 else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.s)

    def __len__(self) -> int:
        return len(self.s)


def _stable_rank(total: Tensor, sigma: Tensor, live: Tensor) -> Tensor:
    """Return ||G||_F^2 / ||G||_2^2, averaged over the slices that are not zero (GaLore, section 3.2)."""
    largest = sigma[..., 0].square()
    return torch.where(largest > 0, total / largest, UNKNOWN)[live].mean()
