"""One step of one unit of work: here a matrix with its subspace; the dense parameters of a group are in dense.py.

Both offer the same moves, in the order in which the engine makes them: `measure` (the tensors from which one can tell
whether the gradient is finite), `begin_` (the moments; what is to be summed over processes) and `finish_` (the
weights). A matrix whose refresh is due goes through `collect_`, `choose_` and `adopt_` before.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowrank import distributed, linalg
from hf_lowrank.allocation import matrix_state
from hf_lowrank.formats import Raw, State
from hf_lowrank.matrices import Layout, clamp_rank, local, sharded
from hf_lowrank.methods import Parts
from hf_lowrank.parts import Context, Update
from hf_lowrank.state import View


UNKNOWN = -1.0
"""Entry of a report that the rule does not know."""


def context(s: State, group: Mapping[str, Any], index: int, **place: Any) -> Context:
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
        orthonormal=group["basis_format"] == "fp32",
        key=(group["seed"], index),
        **place,
    )


class MatrixStep:
    """The step of one low-rank weight.

    Args:
        weight: the parameter.
        raw: its stored state.
        parts: its method.
        group: its options.
        index: its place in group order.
        first_interval: steps between the first refresh and the second (shorter than the gap when staggered).
    """

    def __init__(
        self, weight: Tensor, raw: Raw, parts: Parts, group: Mapping[str, Any], index: int, first_interval: int
    ) -> None:
        self.weight, self.parts, self.group, self.index = weight, parts, group, index
        self.first_interval = first_interval
        self.layout = Layout.of(weight, group["proj_type"])
        held = {name: local(tensor) for name, tensor in raw.items()} if self.layout.along else raw
        self.s = View(held, *matrix_state(parts, self.layout, group))
        self.R: Tensor | None = None  # (..., r, n), not yet summed over processes
        self.measured: Tensor | None = None  # (..., r, columns)
        self.whole: Tensor | None = None  # the gradient of all processes, on the one that chooses
        self.new: dict[str, Tensor] = {}  # a basis on its way in
        self.combining: Generator[Tensor, Tensor, Update] | None = None

    @property
    def G(self) -> Tensor:
        """This process's piece of the gradient, seen wide."""
        assert self.weight.grad is not None
        return self.layout.wide(self.weight.grad)

    @property
    def due(self) -> bool:
        """Whether the subspace is to be refreshed at this step."""
        return bool(self.s["step"] >= self.s["refresh_at"])

    @property
    def mesh(self) -> Any:
        """The mesh over which the weight is split, or None."""
        return self.layout.mesh

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.weight.device

    @property
    def transient(self) -> int:
        """Elements of the whole R, which `measure` makes and `finish_` frees: the same number on every process."""
        return clamp_rank(self.group["rank"], self.layout.m, self.layout.n) * self.layout.n

    @property
    def cost(self) -> float:
        """Work of a refresh: the Gram product on the short side dominates."""
        return refresh_cost(self.weight)

    def collect_(self, owner: int) -> None:
        """Bring the whole gradient to the process that chooses, and a copy of the whole basis to all."""
        assert self.weight.grad is not None
        self.whole = self.layout.whole(self.weight.grad, owner)
        self.new = {}
        for name in self.s.names("basis"):
            self.new[name] = self.s[name].clone()
            if self.layout.along == "batch":
                self.new[name] = sharded(self.s[name], self.mesh, 0, self.layout.batch[0]).full_tensor()
        self.choice = torch.zeros(3, device=self.device)  # changed, energy, stable rank

    def choose_(self) -> None:
        """Choose a new basis from the whole gradient, unless that is zero or not finite."""
        G = self.whole
        assert G is not None
        self.whole = None
        total = linalg.squared_norm(G)  # (...)
        live = total > 0
        if not bool(torch.isfinite(total.sum()) & live.any()):
            return
        old = {name: tensor.clone() for name, tensor in self.new.items()} if not bool(live.all()) else {}
        s = ChainMap(self.new, self.s)  # type: ignore[arg-type]
        sigma = self.parts.subspace.refresh_(s, G, self._context())
        for name, tensor in old.items():  # a slice of zeros (an expert that saw no token) keeps its basis
            keep = live[(...,) + (None,) * (tensor.dim() - live.dim())]
            self.new[name].copy_(torch.where(keep, self.new[name], tensor))
        energy = linalg.squared_norm(self.parts.subspace.project(s, G)).sum() / total.sum()
        stable_rank = torch.tensor(UNKNOWN) if sigma is None else _stable_rank(total, sigma, live)
        self.choice.copy_(torch.stack([torch.ones_like(energy), energy, stable_rank.to(energy)]))

    def adopt_(self, owner: int, group: Any) -> None:
        """Take over the basis that the owner chose, if it did, and carry the moments into it."""
        if group is not None:
            distributed.broadcast_([self.choice, *self.new.values()], owner, group)
        new, self.new = self.new, {}
        changed, energy, stable_rank = self.choice.tolist()
        if not changed:
            return
        if self.layout.along == "batch":
            new = {name: x.narrow(0, self.layout.offset, self.layout.stack[0]) for name, x in new.items()}
        s, ctx, overlap = self.s, self._context(), UNKNOWN
        if ctx.refreshes:
            C = self.parts.subspace.change(ChainMap(new, s), s)  # type: ignore[arg-type] # (..., r, r)
            overlap = float(linalg.overlap(C))
            self.parts.moments.transport_(s, C, self.group["on_refresh"], ctx)
        for name, tensor in new.items():
            s[name].copy_(tensor)
        s.commit("basis", "moment", "variance")
        s["report"].copy_(torch.tensor([overlap, energy, stable_rank]))
        self._schedule_next()

    def project_(self) -> None:
        """Add the projection of the gradient to R; the gradient is not needed for R any more."""
        R = self.parts.subspace.project(self._rows(), self.G)
        self.R = R if self.R is None else self.R.add_(R)

    def measure(self) -> list[Tensor]:
        """Return the projected gradient; a gradient that is not finite makes it so. Twice is the same as once."""
        if self.measured is None:
            if self.R is None:
                self.project_()
            assert self.R is not None
            self.measured, self.R = self.layout.scatter(self.R), None
        return [self.measured]

    def begin_(self, finite: Sequence[bool]) -> Tensor | None:
        """Update the moments, or count the step as skipped; return what is to be summed over processes."""
        R, self.measured = self.measured, None
        assert R is not None, "measure() comes first"
        if not finite[0]:
            self.s["skipped"].add_(1)
            return None
        self.ctx = self._context()
        N = self.parts.moments.update(self.s, R, self.ctx)
        self.c_t = self.parts.moments.step_scale(self.ctx)
        self.combining = self.parts.reconstruction.combine(self.s, self._norms, R, N, self.c_t, self.ctx)
        asked = self._combine(None)
        if asked is None or self.layout.along in ("rows", "columns"):
            return asked
        return self._combine(asked)  # this process holds all columns

    def finish_(self, total: Tensor | None) -> None:
        """Write the weight."""
        if self.combining is None:
            return
        if total is not None:
            self._combine(total)
        beta, alpha = 1 - self.ctx.lr * self.ctx.weight_decay, -self.ctx.lr * self.c_t
        Z, d = self._gathered(self.update)
        subspace, s = self.parts.subspace, self._rows()
        G = self.G if d is not None else None

        def write_(block: Tensor, start: int, length: int) -> None:
            if Z is None:
                block.mul_(beta)
            else:
                subspace.write_(s, block, Z.narrow(-1, start, length), beta=beta, alpha=alpha)
            if G is not None and d is not None:
                columns = G.narrow(-1, start, length).to(block.dtype)
                block.addcmul_(columns, d.narrow(-1, start, length).unsqueeze(-2), value=alpha)

        W = self.layout.wide(self.weight)
        linalg.rewrite_(W, write_, lambda: self.ctx.rounding(W.device))
        self.s.commit("moment", "variance", "exact")
        self.s.forget("basis")
        advance_(self.s)
        self.combining = None

    def _combine(self, total: Tensor | None) -> Tensor | None:
        """Let the reconstruction go on until it asks for a sum (returned) or has the update (kept)."""
        assert self.combining is not None
        try:
            return self.combining.send(total)  # type: ignore[arg-type]
        except StopIteration as stop:
            self.update: Update = stop.value
            return None

    def _context(self) -> Context:
        full = clamp_rank(self.group["rank"], self.layout.m, self.layout.n) == self.layout.m
        return context(self.s, self.group, self.index, full_rank=full, offset=self.layout.offset)

    def _rows(self) -> State:
        if self.layout.along != "rows":
            return self.s
        return self.parts.subspace.rows(self.s, self.layout.rows_of)

    def _norms(self) -> Tensor:
        return self.layout.scatter(linalg.column_squared_norms(self.G))

    def _gathered(self, update: Update) -> tuple[Tensor | None, Tensor | None]:
        """Return Z and d for all columns of this process's piece of the weight, in at most one collective."""
        if self.layout.along != "rows" or update.Z is None or update.d is None:
            return tuple(None if x is None else self.layout.gather(x) for x in (update.Z, update.d))  # type: ignore[return-value]
        together = self.layout.gather(torch.cat([update.Z, update.d.unsqueeze(-2)], -2))
        return together[..., :-1, :], together[..., -1, :]

    def _schedule_next(self) -> None:
        s = self.s
        interval = self.parts.subspace.interval(s, self.group["update_proj_gap"])
        s["refresh_at"].add_(interval if s["refreshes"] else self.first_interval)
        while s["refresh_at"] <= s["step"]:  # it came late
            s["refresh_at"].add_(interval)
        s["refreshes"].add_(1)


def advance_(s: State) -> None:
    """Count one more update."""
    s["step"].add_(1)
    s["moment_step"].add_(1)


def _stable_rank(total: Tensor, sigma: Tensor, live: Tensor) -> Tensor:
    """Return ||G||_F^2 / ||G||_2^2, averaged over the slices that are not zero (GaLore, section 3.2)."""
    largest = sigma[..., 0].square()
    return torch.where(largest > 0, total / largest, UNKNOWN)[live].mean()


def staggered_intervals(costs: list[float], gap: int, together: int = 1) -> list[int]:
    """Return for every matrix the first interval, 1 .. gap, that spreads later refreshes evenly by cost.

    Args:
        costs: work of every refresh.
        gap: steps between refreshes of one matrix.
        together: how many matrices are refreshed at once: one per process.
    """
    intervals, done, total = [], 0.0, sum(costs)
    for start in range(0, len(costs), together):
        some = costs[start : start + together]
        done += sum(some)
        intervals += [max(1, round(gap * done / total))] * len(some)
    return intervals


def refresh_cost(weight: Tensor) -> float:
    """Estimate the work of a refresh: the Gram product on the short side dominates."""
    *batch, rows, columns = weight.shape
    return torch.Size(batch).numel() * float(min(rows, columns)) ** 2 * max(rows, columns)
