"""One step of one matrix in its subspace: the algorithm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.engine.collectives import replicas
from hf_lowrank.engine.plan import Plan
from hf_lowrank.engine.unit import Reading, Unit, Work, asking, gradient_of, has_gradient
from hf_lowrank.methods.context import ColumnNorms, Columns, Context, Update
from hf_lowrank.methods.resolve import Config
from hf_lowrank.state.slots import State, Stored
from hf_lowrank.state.view import View
from hf_lowrank.tensors import kernels, rounding
from hf_lowrank.tensors.bases import Basis
from hf_lowrank.tensors.layout import RowsOf, local


class MatrixStep(Unit):
    """The step of one low-rank weight; it lasts as long as the options do.

    Args:
        weight: the parameter.
        stored: its stored state.
        config: its method and options.
        plan: how it lies, and what its state is.
        group: the group, for what a schedule edits.
        index: its place in group order.
    """

    def __init__(
        self, weight: Tensor, stored: Stored, config: Config, plan: Plan, group: Mapping[str, Any], index: int
    ) -> None:
        assert plan.layout is not None
        self.weight, self.config, self.plan, self.group, self.index = weight, config, plan, group, index
        self.layout, self.stored, self.device, self.mesh = plan.layout, stored, weight.device, plan.layout.mesh
        held = {key: local(tensor) for key, tensor in stored.items()} if self.mesh is not None else stored
        self.view = View(held, plan.buffers, plan.encodings)
        exact = config.options.get("basis_format", "fp32") == "fp32"
        self.isometric = config.parts.subspace.orthonormal and exact
        self.pieces = plan.layout.team
        self.keeps_gradient = config.parts.needs_gradient
        self.shape = weight.shape
        self.norms: Tensor | None = None  # of the columns of this gradient, if they are known
        self.refreshed = False  # whether a refresh has looked at this gradient
        self.reduced = reduces(config) and self.mesh is None and replicas() is not None
        self.averaged = False  # whether they have averaged this gradient all the same
        self.basis: Basis | None = None  # the one in use, if it is known
        self.lasting = (self.view.plain or not self.view.bases) and not plan.pieces  # or decoded, gathered: see `rest`
        self.rests = not (self.lasting and self.view.plain)
        self.waits = config.hooked
        self.before: list[MatrixStep] = []  # whose step this one goes on with

    @property
    @override
    def transient(self) -> int:
        return transient(self.plan, self.config)

    @property
    @override
    def ready(self) -> bool:
        return has_gradient(self.weight, self.shape) or self.started is not None or self.reduced

    @property
    @override
    def local(self) -> bool:
        return self.reduced and not self.averaged

    @override
    def marks(self) -> list[int]:
        return [2 * int(self.stored["step"]) + self.ready]

    @override
    def look(self) -> list[Tensor]:
        """A method that needs the norms of columns has them kept: the gradient is not read for its norm alone."""
        if self.keeps_gradient and self.config.parts.reconstruction.by_columns:
            self.norms = kernels.column_norms(self.gradient)
            return [self.norms]
        return [self.gradient]

    @override
    def forget(self) -> None:
        super().forget()
        self._done_()

    def rest(self) -> None:
        """Drop what was decoded or gathered for a step; it is made anew where it is needed."""
        self.view.forget()
        if not self.lasting:
            self.basis = None

    def take_over_(self, other: MatrixStep) -> None:
        """Go on with a step of this weight that `other` has started: it ends on the options and the state of this."""
        self.started, other.started = other.started, None
        self.before = [*other.before, other]
        for one in self.before:  # the step that waits is a method of one of them
            vars(one).update({**vars(self), "started": None, "before": []})

    def column_norms(self) -> Tensor | None:
        """Return the norms of the gradient's columns if they are known."""
        return self.norms

    def due(self, *, after: bool) -> bool:
        """Tell whether the subspace is to be refreshed before this step, or after it for the next."""
        late = self.config.parts.subspace.late and int(self.stored["refreshes"]) > 0
        if self.ahead and int(self.stored["adopt_at"]):
            return False
        return late is after and int(self.stored["step"]) >= int(self.stored["refresh_at"])

    @property
    def ahead(self) -> int:
        """How many steps a basis is chosen before it is adopted; 0: the step waits for it, as for the first one."""
        return int(self.config.options.get("async_refresh", 0) if self.stored["refreshes"] else 0)

    @override
    def step_(self) -> Work[None]:
        """The algorithm: absorb, project, one finite flag, moments, combine, write."""
        ctx, absorb = self.context(), self.config.parts.reconstruction.absorb
        G: Tensor | None
        G, fresh = yield from asking(absorb(self.view, self.gradient, ctx), self.layout.over_gradient)
        basis = self.basis_in_use()
        R = basis.project(G)  # (..., r, n)
        read = self._read(basis.witness(R))
        del basis  # one that was decoded is not held while this waits
        if not self.keeps_gradient:
            G = None  # the layerwise mode frees it while this waits
        here, waits = self.weight.grad is not None if self.local else None, self.waits
        if not (yield Reading([read], here))[0]:
            self._skip_()
            return
        rules, basis = self.config.parts, self.basis_in_use()
        if waits:  # since a hook took the gradient; the group may have been edited
            ctx = self.context()
        with self.view.writing() as s:
            yield from asking(rules.subspace.observe(s, R, ctx), self.layout.over_projected)
            N = yield from asking(rules.moments.update(s, R, ctx), self.layout.over_projected)
            c_t = rules.moments.step_scale(ctx)
            norms = ColumnNorms(G, basis, self.isometric, self.column_norms())
            U = yield from asking(rules.reconstruction.combine(s, norms, R, N, c_t, ctx), self.layout.over_projected)
            self._write_(basis, G, U, c_t, ctx)
            for name, value in fresh.items():
                s[name].copy_(value)
            if G is not None:
                rules.reconstruction.after_step_(s, G, R, basis)
                if not self.refreshed:
                    rules.subspace.accumulate_(s, G)
        self._advance_()

    def _read(self, R: Tensor) -> Tensor:
        """Return R, or the norms of its columns where a rule looks at those anyway and R is the gradient."""
        if not self.config.parts.reads_norms or self.layout.rows.team:
            return R
        if self.norms is None:
            self.norms = kernels.column_norms(R)
        return self.norms

    def _write_(self, basis: Basis, G: Tensor | None, update: Update, c_t: float, ctx: Context) -> None:
        """W <- (1 - lr wd) W - lr c_t (alpha P Z + G diag(d) + rest)."""
        beta, alpha = 1 - ctx.lr * ctx.weight_decay, -ctx.lr * c_t
        Z, d = basis.spread(update.Z, update.d)
        W, way = self.seen_wide(self.weight), ctx.rounding(self.device)
        if Z is not None:
            basis, Z = basis.factors(Z, W)

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
                basis.add_(block, Z.narrow(-1, start, length), beta=decay, alpha=alpha * update.alpha)

        if update.rest is None and way.fuses(W):
            U = None if Z is None else basis.expand(Z, W)
            way.fused_(W, beta, U, alpha * update.alpha, None if d is None else G, d, alpha)
        else:
            rounding.rewrite_(W, write_, way, blockwise=update.rest is not None)

    def _skip_(self) -> None:
        self.stored["skipped"].add_(1)
        self._done_()

    def _advance_(self) -> None:
        self.stored["step"].add_(1)
        self.stored["moment_step"].add_(1)
        self._done_()

    def _done_(self) -> None:
        self.refreshed, self.averaged, self.norms, self.before = False, False, None, []
        if self.rests:
            self.rest()

    # ---- the pieces -------------------------------------------------------------------------------------------------

    def seen_wide(self, tensor: Tensor) -> Tensor:
        """Return this process's piece of a weight or gradient, short side first."""
        piece = local(tensor) if self.mesh is not None else tensor
        return piece.mT if self.layout.transposed else piece

    @property
    def gradient(self) -> Tensor:
        """This process's piece of the gradient, seen wide; zeros where only other replicas have one."""
        if self.weight.grad is None:
            assert self.local
            return self.seen_wide(torch.zeros_like(self.weight))
        return self.seen_wide(gradient_of(self.weight))

    def basis_in_use(self) -> Basis:
        """Return the basis in use, for this process's piece."""
        if self.basis is None:
            products = self.config.options.get("products", "auto")
            s = self.view.with_(self.whole_bases()) if self.plan.pieces else self.view
            exact = self.config.parts.reconstruction.scales_residual
            chosen = self.config.parts.subspace.basis(s, self.context())
            self.basis = self.placed(chosen.multiplied(products, exact=exact))
        return self.basis

    def whole_bases(self) -> dict[str, Tensor]:
        """Return what is kept of the bases, all of its rows: gathered where other processes keep some of them."""
        s, at = self.view, self.plan.pieces
        return {name: self.layout.of_basis.gathered(s[name], at[name]) if name in at else s[name] for name in s.bases}

    def placed(self, basis: Basis) -> Basis:
        """Return a basis for all rows as one for the rows of this process's piece."""
        return RowsOf(basis, self.layout) if self.layout.rows.team else basis

    def context(self, *, refreshing: bool = False, number: int | None = None) -> Context:
        """Gather what the parts may know: of the basis in use, of the one being chosen, or of basis `number`."""
        if number is None:
            chosen = int(self.stored["refreshes"])
            number = chosen if refreshing else max(0, chosen - 1)
        return context_of(
            self.stored,
            self.config,
            self.group,
            self.index,
            self.plan.columns,
            number=number,
            written=refreshing and self.config.parts.subspace.late and number > 0,
            m=self.layout.m,
            r=self.plan.r,
            place=self.pieces.rank if self.pieces else 0,
            device=self.device,
            weight=self.weight,
        )


def reduces(config: Config) -> bool:
    """Tell whether replicas of a matrix average what they project, in the place of whole gradients.

    The layerwise mode frees a gradient before anything could reduce it.
    """
    options, whole = config.options, config.parts.needs_gradient or config.offloads
    return bool(config.by_matrix and (options["reduce_projected"] or (options["layerwise"] and not whole)))


def transient(plan: Plan, config: Config) -> int:
    """Return the elements that a started step of one matrix keeps: R, what may take the place of the gradient, and a
    basis that was gathered."""
    assert plan.layout is not None
    gathered = math.prod(plan.layout.stack) * plan.layout.m * plan.r if plan.pieces else 0
    m, n = plan.layout.piece
    whole = config.parts.needs_gradient and not config.parts.reconstruction.by_columns
    return plan.r * plan.layout.n + (math.prod(plan.layout.stack) * m * n if whole else 0) + gathered


def context_of(
    s: State, config: Config, group: Mapping[str, Any], index: int, columns: Columns, **place: Any
) -> Context:
    """Gather what the parts may know of this step of parameter `index`."""
    beta1, beta2 = group["betas"]
    lr, options = float(group["lr"]), config.options
    if config.low_rank:
        beta1 = config.parts.moments.beta1(beta1)
    return Context(
        step=int(s["step"]),
        moment_step=int(s["moment_step"]) + 1,
        lr=lr,
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        peak_lr=float(group.get("max_lr", group.get("initial_lr", lr))),  # OneCycleLR starts far below it
        scale=options.get("scale", 1.0),
        correct_bias=options.get("correct_bias", True),
        eps_place=options.get("eps_place", "torch"),
        stochastic_rounding=options["stochastic_rounding"],
        rank=options.get("rank", 0),
        columns=columns,
        key=(options["seed"], index),
        earlier=int(s.get("earlier", 0)),
        dropped_at=int(s.get("dropped_at", 0)),
        **place,
    )
