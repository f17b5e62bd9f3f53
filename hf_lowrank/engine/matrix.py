"""One step of one unit of work: here a matrix with its subspace; the dense parameters of a group are in dense.py.

Both offer the same moves, in the order in which the engine makes them: `measure` (the tensors from which one can tell
whether the gradient is finite) and `step_` (moments and weights). Both are generators that yield what is to be summed
over processes. A matrix whose refresh is due goes through refreshes.py before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_lowrank.engine.plan import Plan
from hf_lowrank.engine.schedule import refresh_cost
from hf_lowrank.methods.context import Columns, Context
from hf_lowrank.methods.parts import Facts, Update
from hf_lowrank.methods.resolve import Parts
from hf_lowrank.state.slots import Raw, State
from hf_lowrank.state.view import View
from hf_lowrank.tensors import kernels, rounding
from hf_lowrank.tensors.bases import Basis
from hf_lowrank.tensors.layout import local
from hf_lowrank.tensors.sums import Summing, alone


T = TypeVar("T")


def context_of(s: State, group: Mapping[str, Any], index: int, columns: Columns, **place: Any) -> Context:
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
        self.total: Tensor | None = None  # ||G||^2, if the energy in a new basis is still to be reported
        self.R: Tensor | None = None  # (..., r, n), not yet summed over processes
        self.measured: Tensor | None = None  # (..., r, columns)
        self.basis: Basis | None = None  # the one in use, once it is needed
        self._now: Context | None = None  # of the step that is being made

    # ---- what the engine asks ---------------------------------------------------------------------------------------

    @property
    def due(self) -> bool:
        """Whether the subspace is to be refreshed before this step."""
        return self._due and not self._late

    @property
    def due_after(self) -> bool:
        """Whether the subspace is to be refreshed after this step, for the next."""
        return self._late and self._due

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

    # ---- a step -----------------------------------------------------------------------------------------------------

    def project_(self) -> Summing[None]:
        """Add the projection of the gradient to R; the gradient is not needed for R any more."""
        absorbing = self.parts.reconstruction.absorb(self.s, self.gradient, self._now or self.context())
        self.absorbed, self.pending = yield from self.summed(absorbing)
        R = self.layout.rows_of(self._whole_basis()).project(self.absorbed)
        if self.total is not None:
            self.s["report"][1] = kernels.sum_of_squares(R) / self.total
            self.total = None
        if not self.parts.needs_gradient:
            self.absorbed = None
        self.R = R if self.R is None else self.R.add_(R)

    def measure(self) -> Summing[list[Tensor]]:
        """Return the projected gradient; a gradient that is not finite makes it so. Twice is the same as once."""
        if self.measured is None:
            if self.R is None:
                self._now = self.context()
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
            self.absorbed, self.pending, self.basis, self._now = None, {}, None, None
            return
        s, rules = self.s, self.parts
        ctx = self._now = self._now or self.context()
        N = yield from self.summed(rules.moments.update(s, R, ctx))
        c_t = rules.moments.step_scale(ctx)
        facts = Facts(self._norms, self._gram)
        update = yield from self.summed(rules.reconstruction.combine(s, facts, R, N, c_t, ctx))
        self._write_(update, c_t, ctx)
        for name, value in self.pending.items():
            s[name].copy_(value)
        if self.absorbed is not None:
            rules.reconstruction.after_(s, self.absorbed, R, self.add_product_)
            if not self.observed:
                rules.subspace.observe_(s, self.absorbed)
        s.commit("moment", "variance", "exact")
        s.forget("basis")
        self.absorbed, self.pending, self.basis, self._now = None, {}, None, None
        advance_(s)

    def _write_(self, update: Update, c_t: float, ctx: Context) -> None:
        """W <- (1 - lr wd) W - lr c_t (alpha P Z + G diag(d) + rest)."""
        beta, alpha = 1 - ctx.lr * ctx.weight_decay, -ctx.lr * c_t
        Z, d = self._gathered(update)
        basis, G = self.layout.rows_of(self._whole_basis()), self.absorbed
        Z = None if Z is None else basis.spread(Z)

        def write_(block: Tensor, start: int, length: int) -> None:
            decay = beta
            if beta != 1.0 and (Z is None or beta == 0.0):
                block.mul_(beta)
                decay = 1.0
            if G is not None and (d is not None or update.rest is not None):  # before the product: still in the cache
                columns = kernels.piece(G, start, length).to(block.dtype)
                if d is not None:
                    block.addcmul_(columns, kernels.piece(d, start, length).unsqueeze(-2), value=alpha / decay)
                if update.rest is not None:
                    block.add_(update.rest(columns, start, length), alpha=alpha / decay)
            if Z is not None:
                basis.add_(block, kernels.piece(Z, start, length), beta=decay, alpha=alpha * update.alpha)

        W = self.layout.wide(self.weight)
        rounding.rewrite_(W, write_, lambda: ctx.rounding(W.device), blockwise=update.rest is not None)

    # ---- the pieces -------------------------------------------------------------------------------------------------

    @property
    def gradient(self) -> Tensor:
        """This process's piece of the gradient, seen wide."""
        assert self.weight.grad is not None
        return self.layout.wide(self.weight.grad)

    @property
    def _due(self) -> bool:
        return int(self.s["step"]) >= int(self.s["refresh_at"])

    @property
    def _late(self) -> bool:
        return self.parts.subspace.late and int(self.s["refreshes"]) > 0

    def context(self, *, refreshing: bool = False, number: int | None = None) -> Context:
        """Gather what the parts may know: of the basis in use, of the one being chosen, or of basis `number`."""
        chosen = int(self.s["refreshes"])
        if number is None:
            number = chosen if refreshing else max(0, chosen - 1)
        return context_of(
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
        if self.basis is None:
            self.basis = self.parts.subspace.basis(self.s, self._now or self.context())
        return self.basis

    def _gram(self) -> Tensor | None:
        exact = self.parts.subspace.orthonormal and self.group.get("basis_format", "fp32") == "fp32"
        return None if exact else self._whole_basis().gram()

    def _norms(self) -> Tensor:
        assert self.absorbed is not None
        return self.layout.scatter(kernels.column_squared_norms(self.absorbed))

    def add_product_(self, X: Tensor, Z: Tensor, alpha: float) -> None:
        """X <- X + alpha P Z for this process's piece X of a full-size matrix."""
        basis = self.layout.rows_of(self._whole_basis())
        basis.add_(X, basis.spread(self.layout.gather(Z)), beta=1.0, alpha=alpha)

    def summed(self, work: Summing[T]) -> Summing[T]:
        """Hand sums on to the processes that hold the other columns, if there are such."""
        if self.layout.summed:
            return (yield from work)
        return alone(work)

    def _gathered(self, update: Update) -> tuple[Tensor | None, Tensor | None]:
        """Return Z and d for all columns of this process's piece of the weight, in at most one collective."""
        if self.layout.along != "rows" or update.Z is None or update.d is None:
            return tuple(None if x is None else self.layout.gather(x) for x in (update.Z, update.d))  # type: ignore[return-value]
        together = self.layout.gather(torch.cat([update.Z, update.d.unsqueeze(-2)], -2))
        return together[..., :-1, :], together[..., -1, :]


def advance_(s: State) -> None:
    """Count one more update."""
    s["step"].add_(1)
    s["moment_step"].add_(1)
