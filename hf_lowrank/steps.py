"""One step of one unit of work: a matrix with its subspace, or the dense parameters of a group.

Both offer the same three moves, in the order in which the engine makes them: `refresh_` (if due), `measure` (the
tensors from which one can tell whether the gradient is finite), `apply_` (moments and weights, where it is).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lowrank import linalg
from hf_lowrank.matrices import clamp_rank, wide
from hf_lowrank.methods import Parts
from hf_lowrank.parts import Context
from hf_lowrank.state import Slot, Slots, State


UNKNOWN = -1.0
"""Entry of a report that the rule does not know."""

COUNTERS: Slots = {"step": Slot((), "counter"), "moment_step": Slot((), "counter"), "skipped": Slot((), "counter")}
REFRESH: Slots = {
    "refreshes": Slot((), "counter"),
    "refresh_at": Slot((), "counter"),
    "report": Slot((3,), "exact"),  # overlap with the basis before, captured energy, stable rank: of the last refresh
}


def matrix_slots(parts: Parts, shape: torch.Size, group: Mapping[str, Any]) -> Slots:
    """Declare the state of a low-rank weight of this shape."""
    view = wide(torch.empty(shape, device="meta"), group["proj_type"])
    *batch, m, n = view.shape
    r = clamp_rank(group["rank"], m, n)
    size = (tuple(batch), m, n, r)
    return {
        **parts.subspace.slots(*size),
        **parts.moments.slots((*batch, r, n)),
        **parts.reconstruction.slots(*size),
        **COUNTERS,
        **REFRESH,
    }


def dense_slots(parts: Parts, shape: torch.Size) -> Slots:
    """Declare the state of a parameter that has no subspace."""
    return {**parts.moments.slots(tuple(shape)), **COUNTERS}


def context(s: State, group: Mapping[str, Any], index: int) -> Context:
    """Gather what the parts may know of this step of parameter `index`."""
    beta1, beta2 = group["betas"]
    return Context(
        step=int(s["step"]),
        moment_step=int(s["moment_step"]) + 1,
        refreshes=int(s["refreshes"]) if "refreshes" in s else 0,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        scale=group.get("scale", 1.0),
        correct_bias=group["correct_bias"],
        stochastic_rounding=group["stochastic_rounding"],
        key=(group["seed"], index),
    )


@dataclass
class MatrixStep:
    """The step of one low-rank weight.

    Attributes:
        weight, grad, state: the parameter's.
        parts: its method.
        group: its options.
        index: its place in group order.
        first_interval: steps between the first refresh and the second (shorter than the gap when staggered).
    """

    weight: Tensor
    grad: Tensor
    state: State
    parts: Parts
    group: Mapping[str, Any]
    index: int
    first_interval: int

    def __post_init__(self) -> None:
        self.W = wide(self.weight, self.group["proj_type"])  # (..., m, n)
        self.G = wide(self.grad, self.group["proj_type"])  # (..., m, n)
        self.R: Tensor | None = None  # (..., r, n)

    @property
    def due(self) -> bool:
        """Whether the subspace is to be refreshed at this step."""
        return bool(self.state["step"] >= self.state["refresh_at"])

    @property
    def transient(self) -> int:
        """Elements that `measure` makes and `apply_` frees: those of R, at most."""
        return self.grad.numel() // max(self.W.shape[-2], 1) * clamp_rank(self.group["rank"], *self.W.shape[-2:])

    def refresh_(self) -> bool:
        """Choose a new basis and carry the moments over, unless the gradient is zero or not finite (it stays due)."""
        s, G, parts = self.state, self.G, self.parts
        total = linalg.squared_norm(G)
        live = total > 0
        if not bool(torch.isfinite(total.sum()) & live.any()):
            return False
        ctx = context(s, self.group, self.index)
        stored = [name for name, slot in self._slots().items() if slot.kind == "basis"]
        old = {name: s[name].clone() for name in stored}
        sigma = parts.subspace.refresh_(s, G, ctx)
        for name in stored:  # a slice of zeros (an expert that saw no token) keeps its basis
            s[name].copy_(torch.where(live[(...,) + (None,) * (s[name].dim() - live.dim())], s[name], old[name]))
        overlap = torch.tensor(UNKNOWN)
        if ctx.refreshes:
            C = parts.subspace.change(s, old)  # (..., r, r)
            overlap = linalg.overlap(C)
            parts.moments.transport_(s, C, self.group["on_refresh"], ctx)
        energy = linalg.squared_norm(parts.subspace.project(s, G)).sum() / total.sum()
        stable_rank = torch.tensor(UNKNOWN) if sigma is None else _stable_rank(total, sigma, live)
        s["report"].copy_(torch.stack([x.to(s["report"]) for x in (overlap, energy, stable_rank)]))
        self._schedule_next()
        return True

    def measure(self) -> list[Tensor]:
        """Project the gradient; a non-finite gradient makes the projection non-finite."""
        self.R = self.parts.subspace.project(self.state, self.G)
        return [self.R]

    def apply_(self, finite: list[bool]) -> None:
        """Update the moments and write the weight, or count the step as skipped."""
        s, R, self.R = self.state, self.R, None
        assert R is not None, "measure() comes first"
        if not finite[0]:
            s["skipped"] += 1
            return
        parts, G, ctx = self.parts, self.G, context(s, self.group, self.index)
        N = parts.moments.update(s, R, ctx)  # (..., r, n)
        c_t = parts.moments.step_scale(ctx)
        update = parts.reconstruction.combine(s, G, R, N, c_t, ctx)
        beta, alpha = 1 - ctx.lr * ctx.weight_decay, -ctx.lr * c_t

        def write_(block: Tensor, start: int, length: int) -> None:
            if update.Z is None:
                block.mul_(beta)
            else:
                parts.subspace.write_(s, block, update.Z.narrow(-1, start, length), beta=beta, alpha=alpha)
            if update.d is not None:
                columns = G.narrow(-1, start, length).to(block.dtype)
                block.addcmul_(columns, update.d.narrow(-1, start, length).unsqueeze(-2), value=alpha)

        linalg.rewrite_(self.W, write_, ctx.rounding(self.W.device), dim=-1)
        _advance_(s)

    def _schedule_next(self) -> None:
        s = self.state
        interval = self.parts.subspace.interval(s, self.group["update_proj_gap"])
        s["refresh_at"] += interval if s["refreshes"] else self.first_interval
        while s["refresh_at"] <= s["step"]:  # it came late
            s["refresh_at"] += interval
        s["refreshes"] += 1

    def _slots(self) -> Slots:
        return matrix_slots(self.parts, self.weight.shape, self.group)


@dataclass
class DenseStep:
    """The step of all dense parameters of one group: the same moments with no subspace."""

    weights: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    parts: Parts
    group: Mapping[str, Any]
    indices: list[int]

    due = False
    transient = 0

    def refresh_(self) -> bool:
        """Nothing to refresh."""
        return False

    def measure(self) -> list[Tensor]:
        """Return the gradients."""
        return self.grads

    def apply_(self, finite: list[bool]) -> None:
        """Step the parameters whose gradient is finite; count the others as skipped."""
        good = [i for i, ok in enumerate(finite) if ok]
        for i in set(range(len(finite))) - set(good):
            self.states[i]["skipped"] += 1
        if not good:
            return
        states = [self.states[i] for i in good]
        contexts = [context(self.states[i], self.group, self.indices[i]) for i in good]
        weights, grads = [self.weights[i] for i in good], [self.grads[i] for i in good]
        self.parts.moments.dense_step_(weights, grads, states, contexts)
        for s in states:
            _advance_(s)


def _advance_(s: State) -> None:
    s["step"] += 1
    s["moment_step"] += 1


def _stable_rank(total: Tensor, sigma: Tensor, live: Tensor) -> Tensor:
    """Return ||G||_F^2 / ||G||_2^2, averaged over the slices that are not zero (GaLore, section 3.2)."""
    largest = sigma[..., 0].square()
    return torch.where(largest > 0, total / largest, UNKNOWN)[live].mean()


def staggered_intervals(costs: list[float], gap: int) -> list[int]:
    """Return for every matrix the first interval, 1 .. gap, that spreads later refreshes evenly by cost."""
    intervals, done, total = [], 0.0, sum(costs)
    for cost in costs:
        done += cost
        intervals.append(max(1, round(gap * done / total)))
    return intervals


def refresh_cost(weight: Tensor) -> float:
    """Estimate the work of a refresh: the Gram product on the short side dominates."""
    *batch, rows, columns = weight.shape
    return torch.Size(batch).numel() * float(min(rows, columns)) ** 2 * max(rows, columns)
