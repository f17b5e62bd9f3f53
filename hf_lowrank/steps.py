"""One step of one unit of work: here a matrix with its subspace; the dense parameters of a group are in dense.py.

Both offer the same moves, in the order in which the engine makes them: `measure` (the tensors from which one can tell
whether the gradient is finite) and `step_` (moments and weights). Both are generators that yield what is to be summed
over processes. A matrix whose refresh is due goes through `collect_`, `choose_` and `adopt_` before.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_lowrank import distributed, linalg
from hf_lowrank.allocation import Plan
from hf_lowrank.bases import Basis
from hf_lowrank.formats import Raw, State
from hf_lowrank.matrices import local, sharded
from hf_lowrank.methods import Parts
from hf_lowrank.parts import Columns, Context, Facts, Summing, Update, alone
from hf_lowrank.schedule import refresh_cost
from hf_lowrank.state import View


T = TypeVar("T")

UNKNOWN = -1.0
"""Entry of a report that the rule does not know."""


def context(s: State, group: Mapping[str, Any], index: int, columns: Columns, **place: Any) -> Context:
    """Gather what the parts may know of this step of parameter `index`."""
    beta1, beta2 = group["betas"]
    return Context(
        step=int(s["step"]),
        moment_step=int(s["moment_step"]) + 1,
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        initial_lr=float(group.get("initial_lr", group["lr"])),
        scale=group.get("scale", 1.0),
        correct_bias=group["correct_bias"],
        stochastic_rounding=group["stochastic_rounding"],
        rank=group.get("rank", 0),
        columns=columns,
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
        plan: how it lies, and what its state is.
        first_interval: steps between the first refresh and the second where they are staggered, else None.
    """

    def __init__(
        self,
        weight: Tensor,
        raw: Raw,
        parts: Parts,
        group: Mapping[str, Any],
        index: int,
        plan: Plan,
        first_interval: int | None,
    ) -> None:
        self.weight, self.parts, self.group, self.index = weight, parts, group, index
        self.first_interval = first_interval
        self.layout, self.columns, self.r = plan.layout, plan.columns, plan.r
        held = {key: local(tensor) for key, tensor in raw.items()} if self.layout.along else raw
        self.s = View(held, plan.slots, plan.forms)
        self.absorbed: Tensor | None = None  # what takes the place of the gradient
        self.pending: dict[str, Tensor] = {}  # slots to be stored if the step is finite
        self.observed = False  # whether a refresh has looked at this gradient
        self.R: Tensor | None = None  # (..., r, n), not yet summed over processes
        self.measured: Tensor | None = None  # (..., r, columns)
        self.whole: Tensor | None = None  # the gradient of all processes, on the one that chooses
        self.new: dict[str, Tensor] = {}  # a basis on its way in
        self._basis: Basis | None = None
        self._now: Context | None = None  # of the step that is being made

    # ---- what the engine asks ---------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether the subspace is to be refreshed before this step."""
        return self._due and not self._late

    @property
    def due_after(self) -> bool:
        """Whether the subspace is to be refreshed after this step, for the next."""
        return self._due and self._late

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
        """Elements of the whole R, which `measure` makes and `step_` frees: the same number on every process."""
        return self.r * self.layout.n

    @property
    def cost(self) -> float:
        """Work of a refresh: the Gram product on the short side dominates."""
        return refresh_cost(self.weight)

    # ---- a refresh --------------------------------------------------------------------------------------------------

    def collect_(self, owner: int) -> Summing[None]:
        """Bring what the rule looks at to the process that chooses, and a copy of the whole basis to all."""
        ctx = self._context(refreshing=True)
        G, _ = yield from self._summed(self.parts.reconstruction.absorb(self.s, self._gradient, ctx))
        self.whole = self.layout.whole(self.parts.subspace.evidence(self.s, G, ctx), owner)
        self.new = {name: self._gathered_stack(self.s[name]).clone() for name in self.s.names("basis")}
        self.wanted = {name: self._gathered_moment(self.s[name]) for name in self.parts.subspace.wants}
        self.choice = torch.tensor([0.0, UNKNOWN, UNKNOWN, UNKNOWN], device=self.device)  # changed, then the report

    def choose_(self) -> None:
        """Choose a new basis from the whole gradient, unless that is zero or not finite."""
        G = self.whole
        assert G is not None
        self.whole = None
        total = linalg.squared_norm(G)  # (...)
        live = total > 0
        if not bool(torch.isfinite(total.sum()) & live.any()):
            return
        subspace, ctx = self.parts.subspace, self._context(refreshing=True)
        old = {name: tensor.clone() for name, tensor in self.new.items()}
        s = ChainMap(self.new, self.wanted, self.s)  # type: ignore[arg-type]
        sigma = subspace.refresh_(s, G, ctx)
        if not bool(live.all()):  # a slice of zeros (an expert that saw no token) keeps its basis
            for name, tensor in old.items():
                keep = live[(...,) + (None,) * (tensor.dim() - live.dim())]
                self.new[name].copy_(torch.where(keep, self.new[name], tensor))
        basis = subspace.basis(s, ctx)
        unknown = torch.tensor(UNKNOWN)
        before = subspace.basis(ChainMap(old, s), self._context(number=ctx.number - 1))
        overlap = linalg.overlap(basis.changes(before)[0]) if ctx.number and subspace.orthonormal else unknown
        energy = linalg.squared_norm(basis.project(G)).sum() / total.sum() if subspace.orthonormal else unknown
        stable_rank = unknown if sigma is None else _stable_rank(total, sigma, live)
        report = [x.to(self.choice) for x in (torch.ones(()), overlap, energy, stable_rank)]
        self.choice.copy_(torch.stack(report))

    def adopt_(self, owner: int, group: Any) -> None:
        """Take over the basis that the owner chose, if it did, and carry the moments into it."""
        if group is not None:
            distributed.broadcast_([self.choice, *self.new.values()], owner, group)
        new, self.new, self.wanted = self.new, {}, {}
        changed, overlap, energy, stable_rank = self.choice.tolist()
        if not changed:
            return
        if self.layout.along == "batch":
            new = {name: x.narrow(0, self.layout.offset, self.layout.stack[0]) for name, x in new.items()}
        s, ctx, how = self.s, self._context(refreshing=True), self.group.get("on_refresh", "keep")
        rules, moments = self.parts, self.parts.moments
        if ctx.number:
            self._basis = rules.subspace.basis(s, self._context(number=ctx.number - 1))
            rules.reconstruction.moved_(s, lambda: moments.momentum(s), self._add_, 1.0, ctx)
            after = rules.subspace.basis(ChainMap(new, s), ctx)  # type: ignore[arg-type]
            for C, side in zip(after.changes(self._basis), (s, _Turned(s)), strict=False):
                moments.transport_(side, C, how, ctx)
            self._basis = after
            rules.reconstruction.moved_(s, lambda: moments.momentum(s), self._add_, -1.0, ctx)
        for name, tensor in new.items():
            s[name].copy_(tensor)
        s.commit("basis", "moment", "variance")
        s["report"].copy_(torch.tensor([overlap, energy, stable_rank]))
        interval = rules.subspace.adopted_(s, self.group.get("update_proj_gap", 1), overlap)
        s.commit("exact")
        self._basis, self._now, self.observed = None, None, True
        self._schedule_next(interval)

    # ---- a step -----------------------------------------------------------------------------------------------------

    def project_(self) -> Summing[None]:
        """Add the projection of the gradient to R; the gradient is not needed for R any more."""
        absorbing = self.parts.reconstruction.absorb(self.s, self._gradient, self._now or self._context())
        self.absorbed, self.pending = yield from self._summed(absorbing)
        R = self.layout.rows_of(self._whole_basis()).project(self.absorbed)
        if not self.parts.needs_gradient:
            self.absorbed = None
        self.R = R if self.R is None else self.R.add_(R)

    def measure(self) -> Summing[list[Tensor]]:
        """Return the projected gradient; a gradient that is not finite makes it so. Twice is the same as once."""
        if self.measured is None:
            if self.R is None:
                self._now = self._context()
                yield from self.project_()
            assert self.R is not None
            self.measured, self.R = self.layout.scatter(self.R), None
        return [self.measured]

    def step_(self, finite: Sequence[bool]) -> Summing[None]:
        """Update the moments and write the weight, or count the step as skipped."""
        R, self.measured = self.measured, None
        assert R is not None, "measure() comes first"
        if not finite[0]:
            self.s["skipped"].add_(1)
            self.absorbed, self.pending = None, {}
            return
        s, rules = self.s, self.parts
        ctx = self._now = self._now or self._context()
        N = yield from self._summed(rules.moments.update(s, R, ctx))
        c_t = rules.moments.step_scale(ctx)
        facts = Facts(self._norms, self._gram)
        update = yield from self._summed(rules.reconstruction.combine(s, facts, R, N, c_t, ctx))
        self._write_(update, c_t, ctx)
        for name, value in self.pending.items():
            s[name].copy_(value)
        if self.absorbed is not None:
            rules.reconstruction.after_(s, self.absorbed, R, self._add_)
            if not self.observed:
                rules.subspace.observe_(s, self.absorbed)
        s.commit("moment", "variance", "exact")
        s.forget("basis")
        self.absorbed, self.pending, self._basis, self._now = None, {}, None, None
        advance_(s)

    def _write_(self, update: Update, c_t: float, ctx: Context) -> None:
        """W <- (1 - lr wd) W - lr c_t (alpha P Z + G diag(d) + rest)."""
        beta, alpha = 1 - ctx.lr * ctx.weight_decay, -ctx.lr * c_t
        Z, d = self._gathered(update)
        basis, G = self.layout.rows_of(self._whole_basis()), self.absorbed
        Z = None if Z is None else basis.spread(Z)

        def write_(block: Tensor, start: int, length: int) -> None:
            if Z is None:
                if beta != 1.0:
                    block.mul_(beta)
            else:
                basis.add_(block, linalg.piece(Z, start, length), beta=beta, alpha=alpha * update.alpha)
            if G is None or (d is None and update.rest is None):
                return
            columns = linalg.piece(G, start, length).to(block.dtype)
            if d is not None:
                block.addcmul_(columns, linalg.piece(d, start, length).unsqueeze(-2), value=alpha)
            if update.rest is not None:
                block.add_(update.rest(columns, start, length), alpha=alpha)

        W = self.layout.wide(self.weight)
        linalg.rewrite_(W, write_, lambda: ctx.rounding(W.device), blockwise=update.rest is not None)

    # ---- the pieces -------------------------------------------------------------------------------------------------

    @property
    def _gradient(self) -> Tensor:
        """This process's piece of the gradient, seen wide."""
        assert self.weight.grad is not None
        return self.layout.wide(self.weight.grad)

    @property
    def _due(self) -> bool:
        return int(self.s["step"]) >= int(self.s["refresh_at"])

    @property
    def _late(self) -> bool:
        return self.parts.subspace.late and int(self.s["refreshes"]) > 0

    def _context(self, *, refreshing: bool = False, number: int | None = None) -> Context:
        chosen = int(self.s["refreshes"])
        if number is None:
            number = chosen if refreshing else max(0, chosen - 1)
        return context(
            self.s,
            self.group,
            self.index,
            self.columns,
            number=number,
            m=self.layout.m,
            r=self.r,
            split=self.layout.along,
            offset=self.layout.offset,
            device=self.device,
        )

    def _whole_basis(self) -> Basis:
        """Return the basis in use, for all rows."""
        if self._basis is None:
            self._basis = self.parts.subspace.basis(self.s, self._now or self._context())
        return self._basis

    def _gram(self) -> Tensor | None:
        exact = self.parts.subspace.orthonormal and self.group.get("basis_format", "fp32") == "fp32"
        return None if exact else self._whole_basis().gram()

    def _norms(self) -> Tensor:
        assert self.absorbed is not None
        return self.layout.scatter(linalg.column_squared_norms(self.absorbed))

    def _add_(self, X: Tensor, Z: Tensor, alpha: float) -> None:
        """X <- X + alpha P Z for this process's piece X of a full-size matrix."""
        basis = self.layout.rows_of(self._whole_basis())
        basis.add_(X, basis.spread(self.layout.gather(Z)), beta=1.0, alpha=alpha)

    def _summed(self, work: Summing[T]) -> Summing[T]:
        """Hand sums on to the processes that hold the other columns, if there are such."""
        if self.layout.summed:
            return (yield from work)
        return alone(work)

    def _gathered_stack(self, tensor: Tensor) -> Tensor:
        """Return a basis for all matrices of a stack that is split over processes."""
        if self.layout.along != "batch":
            return tensor
        return sharded(tensor.contiguous(), self.mesh, 0, self.layout.batch[0]).full_tensor()

    def _gathered_moment(self, tensor: Tensor) -> Tensor:
        """Return a moment as a whole."""
        if self.layout.summed:
            return sharded(tensor.contiguous(), self.mesh, tensor.dim() - 1, self.layout.n).full_tensor()
        return self._gathered_stack(tensor)

    def _gathered(self, update: Update) -> tuple[Tensor | None, Tensor | None]:
        """Return Z and d for all columns of this process's piece of the weight, in at most one collective."""
        if self.layout.along != "rows" or update.Z is None or update.d is None:
            return tuple(None if x is None else self.layout.gather(x) for x in (update.Z, update.d))  # type: ignore[return-value]
        together = self.layout.gather(torch.cat([update.Z, update.d.unsqueeze(-2)], -2))
        return together[..., :-1, :], together[..., -1, :]

    def _schedule_next(self, interval: int) -> None:
        s = self.s
        first = None if s["refreshes"] else self.first_interval
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

    def __iter__(self) -> Any:
        return iter(self.s)

    def __len__(self) -> int:
        return len(self.s)


def advance_(s: State) -> None:
    """Count one more update."""
    s["step"].add_(1)
    s["moment_step"].add_(1)


def _stable_rank(total: Tensor, sigma: Tensor, live: Tensor) -> Tensor:
    """Return ||G||_F^2 / ||G||_2^2, averaged over the slices that are not zero (GaLore, section 3.2)."""
    largest = sigma[..., 0].square()
    return torch.where(largest > 0, total / largest, UNKNOWN)[live].mean()
