"""New bases: what the rules look at is collected, one process chooses each, and all adopt them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_lowrank.engine import step
from hf_lowrank.engine.collectives import broadcast_
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.engine.schedule import owners, refresh_cost, waves
from hf_lowrank.engine.step import SYNC_ELEMENTS, advance
from hf_lowrank.engine.unit import Unit, Work, asking
from hf_lowrank.methods.context import Carried
from hf_lowrank.state.slots import State
from hf_lowrank.tensors import kernels, products
from hf_lowrank.tensors.splits import Team, group_of


AXES = 1e-3
"""How far the first axes may be from themselves in the formats of bases: 2e-5 in 8 bits."""

UNKNOWN = -1.0
"""Entry of a report that the rule does not know."""


@products.precision("ieee")
def refresh_(
    due: Sequence[MatrixStep],
    intervals: Mapping[MatrixStep, int],
    flags: Mapping[Unit, Sequence[bool]],
    *,
    share: bool,
) -> int:
    """Choose new bases, each on one process where the work is shared, and carry the moments over, in full precision.

    Args:
        due: the matrices.
        intervals: steps from the first refresh to the second, where that is not the usual interval.
        flags: what is known of their gradients: whether they are finite.
        share: whether the processes of DistributedDataParallel share the work.

    Returns:
        How many this process chose.
    """
    here = 0
    for mesh in dict.fromkeys(unit.mesh for unit in due):
        # the costliest first, so that processes that work at the same time have as much to do
        costs = {unit: refresh_cost(unit.weight) for unit in due if unit.mesh == mesh}
        units = sorted(costs, key=lambda unit: -costs[unit])
        rank, world = team(mesh, share=share)
        group = None if world == 1 else group_of(mesh, share=share)
        for wave in waves(units, owners([costs[unit] for unit in units], world), wave_size(units)):
            refreshes = [Refresh(unit, chooser) for unit, chooser in wave]
            advance([refresh.collect_() for refresh in refreshes], [None] * len(refreshes))
            for refresh in refreshes:
                if refresh.owner == rank:
                    refresh.choose_(finite=all(flags.get(refresh.unit, (True,))))
                    here += 1
            if group is not None:
                for refresh in refreshes:
                    broadcast_([refresh.choice, *refresh.new.values()], refresh.owner, group)
            choices = torch.stack([refresh.choice for refresh in refreshes]).tolist()  # the host waits here, once
            for refresh, (changed, overlap, *_) in zip(refreshes, choices, strict=True):
                if changed:
                    refresh.adopt_(overlap, intervals.get(refresh.unit))
    return here


def wave_size(units: Sequence[MatrixStep]) -> int:
    """Return how many bases one process chooses before the host looks at the outcome: one on the CPU."""
    if not units or not step.at_once(units[0].device):
        return 1
    return max(1, SYNC_ELEMENTS // max(_held(unit) for unit in units))


def _held(unit: MatrixStep) -> int:
    """Return the elements that a refresh keeps of one matrix until it is adopted: a copy of the basis, or a whole
    m x n matrix where the gradient is replaced, or gathered from other processes."""
    layout = unit.layout
    whole = unit.mesh is not None or unit.config.parts.replaces_gradient
    if whole:
        return math.prod(layout.stack) * layout.m * layout.n
    return layout.m * unit.plan.r if unit.view.bases else 1


def team(mesh: Any, *, share: bool) -> tuple[int, int]:
    """Return (rank, world size) of the processes that share the refreshes of a weight on this mesh."""
    if mesh is None and not share:
        return 0, 1
    if mesh is None:
        return dist.get_rank(), dist.get_world_size()
    return (all_of := Team.of(mesh)).rank, all_of.size


class Refresh:
    """A refresh of one matrix: `collect_`, `choose_` (on one process) and `adopt_`.

    Args:
        unit: the matrix.
        owner: the process that chooses.
    """

    def __init__(self, unit: MatrixStep, owner: int) -> None:
        self.unit, self.owner = unit, owner
        self.ctx, self.subspace = unit.context(refreshing=True), unit.config.parts.subspace
        self.before = unit.context(number=self.ctx.number - 1)
        self.gradient: Tensor | None = None  # what the rule looks at, on the process that chooses
        self.absorbed: Tensor | None = None  # this process's piece of it, for a part that follows a change of basis
        self.old: dict[str, Tensor] = {}  # the basis in use, where this process keeps a piece of it
        self.new: dict[str, Tensor] = {}  # the basis on its way in
        self.known: dict[str, Tensor] = {}  # what else the rule looks at, of all matrices
        self.changes: list[Tensor] = []  # from the basis before to the new one, where this process knows them
        # whether the basis changes, then overlap with the one before, energy, stable rank
        self.choice = torch.full((4,), UNKNOWN, dtype=torch.float32, device=unit.device)
        self.choice[:1].zero_()

    def collect_(self) -> Work[None]:
        """Bring what the rule looks at to the process that chooses, and a copy of the whole basis to all."""
        unit, s = self.unit, self.unit.view
        rule = unit.config.parts.reconstruction
        G, _ = yield from asking(rule.absorb(s, unit.gradient, self.ctx), unit.layout.over_gradient)
        self.absorbed = G if rule.needs_momentum else None
        self.gradient = unit.layout.whole(self.subspace.refresh_gradient(s, G, self.ctx), self.owner)
        whole = unit.whole_bases()
        self.old = {name: whole[name] for name in unit.plan.pieces}
        self.new = {name: self._whole_stack(tensor).clone() for name, tensor in whole.items()}
        own = {name: slot for name, slot in self.subspace.slots().items() if slot.lifetime == "step"}
        self.known = {n: self._whole_stack(s[n]) for n, slot in own.items() if not (slot.shared or slot.held)}
        if self.subspace.needs_momentum:
            self.known["momentum"] = self._whole_moment(unit.config.parts.moments.mean_gradient(s, self.ctx))
        s.forget()

    def choose_(self, *, finite: bool) -> None:
        """Choose a new basis from the whole gradient, unless that is zero or not finite; the host waits for nothing.

        Args:
            finite: False if it is known that the gradient is not finite, which no decomposition would survive.
        """
        G, self.gradient = self.gradient, None
        assert G is not None
        total = kernels.squared_norm(G)  # (...)
        if not finite or (not step.at_once(G.device) and not bool(torch.isfinite(total.sum()))):
            return
        live, stacked, split = total > 0, total.dim() > 0, self.unit.layout.matrices.team is not None
        old = {name: tensor.clone() for name, tensor in self.new.items()} if stacked else {}
        s = self.unit.view.with_({**self.known, **self.new})
        sigma = self.subspace.refresh_(s, G, self.ctx)
        if old and self.ctx.number and self.subspace.begins_apart:
            self._begin_(live & self._untouched(old), old, G)
        for name, tensor in old.items():  # a slice of zeros (an expert that saw no token) keeps its basis
            keep = live[(...,) + (None,) * (tensor.dim() - live.dim())]
            self.new[name].copy_(torch.where(keep, self.new[name], tensor))
        basis = self.subspace.basis(s, self.ctx)
        changed, overlap, energy, stable_rank = self.choice.unbind(0)
        changed.copy_(live.any())
        if self.subspace.orthonormal:
            if self.ctx.number:
                before = self.subspace.basis(self.unit.view.with_({**self.old, **old}), self.before)
                changes = basis.changes(before)
                overlap.copy_(kernels.overlap(changes[0]))
                self.changes = [] if split else changes
            energy.copy_(kernels.squared_norm(basis.project(G)).sum() / total.sum())
        if sigma is not None:
            stable_rank.copy_(_stable_rank(total, sigma, live))

    def _untouched(self, old: Mapping[str, Tensor]) -> Tensor:
        """Return which matrices of a stack have had no basis yet: an expert that saw no token at the first refresh."""
        first = [name for name, slot in self.subspace.slots().items() if slot.axes_first]
        away = [(x := old[name]) - torch.eye(*x.shape[-2:], device=x.device, dtype=x.dtype) for name in first]
        return torch.stack([X.abs().amax((-2, -1)) < AXES for X in away]).all(0)

    def _begin_(self, which: Tensor, old: Mapping[str, Tensor], G: Tensor) -> None:
        """Choose the first basis of some matrices of a stack, which the others have had long ago."""
        if bool(which.any()):  # the host waits here, for stacks of a rule that begins apart alone
            first = {name: tensor.clone() for name, tensor in old.items()}
            self.subspace.refresh_(self.unit.view.with_({**self.known, **first}), G, self.unit.context(number=0))
            for name, tensor in first.items():
                here = which[(...,) + (None,) * (tensor.dim() - which.dim())]
                self.new[name].copy_(torch.where(here, tensor, self.new[name]))

    def adopt_(self, overlap: float, first_interval: int | None) -> None:
        """Take over the basis that the owner chose, and carry the moments into it."""
        unit, layout, new = self.unit, self.unit.layout, self.new
        if (matrices := layout.matrices).team is not None:
            new = {name: x.narrow(0, matrices.start, matrices.length) for name, x in new.items()}
        with unit.view.writing(bases=True) as s:
            if self.ctx.number:
                self._carry_over_(s, new)
            for name, tensor in new.items():
                at = unit.plan.pieces.get(name)
                s[name].copy_(
                    tensor if at is None else tensor.narrow(at, layout.of_basis.start, layout.of_basis.length)
                )
            s["report"].copy_(self.choice[1:])
            interval = self.subspace.interval_(s, unit.config.options.get("update_proj_gap", 1), overlap)
        unit.basis, unit.refreshed, self.old, self.new = None, True, {}, {}
        self.absorbed, self.known = None, {}
        self._schedule_next(interval, first_interval)

    def _carry_over_(self, s: State, new: Mapping[str, Tensor]) -> None:
        """Carry the moments from the basis in use into the new one."""
        unit, rules, how = self.unit, self.unit.config.parts, self.unit.config.options.get("on_refresh", "keep")
        before, after = (
            self.subspace.basis(unit.view.with_(bases), ctx)
            for bases, ctx in ((self.old, self.before), (new, self.ctx))
        )
        follows = rules.reconstruction.needs_momentum
        M = rules.moments.first_moment(s, self.ctx).clone() if follows else None
        left, *right = self.changes or after.changes(before)
        rules.moments.transport_(s, left, how, self.ctx)
        for C in right:  # both sides are projected: the same for the moments turned
            names = (*rules.moments.slots(self.ctx.columns), "moment_step")
            turned = {name: s[name].mT if s[name].dim() > 1 else s[name] for name in names}
            rules.moments.transport_(turned, C, how, self.ctx)
        if M is not None:
            old, now = (
                Carried(unit.placed(before), M),
                Carried(unit.placed(after), rules.moments.first_moment(s, self.ctx)),
            )
            assert self.absorbed is not None
            rules.reconstruction.change_basis_(s, self.absorbed, old, now, self.ctx)

    def _whole_stack(self, tensor: Tensor) -> Tensor:
        """Return a basis for all matrices of a stack that is split over processes."""
        return self.unit.layout.matrices.gathered(tensor, 0)

    def _whole_moment(self, tensor: Tensor) -> Tensor:
        """Return a moment as a whole."""
        return self._whole_stack(self.unit.layout.projected.gathered(tensor, tensor.dim() - 1))

    def _schedule_next(self, interval: int, first_interval: int | None) -> None:
        s = self.unit.stored
        first = None if s["refreshes"] else first_interval
        s["refresh_at"].add_(interval if first is None else first)
        while s["refresh_at"] <= s["step"]:  # it was due before: a gradient of zeros, a layerwise step
            s["refresh_at"].add_(interval)
        s["refreshes"].add_(1)


def _stable_rank(total: Tensor, sigma: Tensor, live: Tensor) -> Tensor:
    """Return ||G||_F^2 / ||G||_2^2, averaged over the slices that are not zero (GaLore, section 3.2)."""
    largest = sigma[..., 0].square()
    ranks = torch.where(largest > 0, total / largest, UNKNOWN)
    return torch.where(live, ranks, 0.0).sum() / live.sum()
