"""The step of the parameters that have no subspace: embeddings, norms, biases, heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from hf_lowrank.engine.matrix import context_of
from hf_lowrank.engine.plan import Plan
from hf_lowrank.engine.unit import Reading, Unit, Work, asking, gradient_of, has_gradient
from hf_lowrank.methods.context import Context
from hf_lowrank.methods.resolve import Config
from hf_lowrank.state.slots import Stored
from hf_lowrank.state.view import View
from hf_lowrank.tensors import kernels
from hf_lowrank.tensors.layout import local
from hf_lowrank.tensors.splits import team_of


class DenseStep(Unit):
    """The step of all parameters of one group on one mesh that have no subspace.

    Args:
        weights: the parameters.
        stored: their stored state.
        config: their method and options.
        plans: their state.
        group: the group, for what a schedule edits.
        indices: their places in group order.
    """

    transient = 0

    def __init__(
        self,
        weights: Sequence[Tensor],
        stored: Sequence[Stored],
        config: Config,
        plans: Sequence[Plan],
        group: Mapping[str, Any],
        indices: Sequence[int],
    ) -> None:
        self.weights, self.stored, self.config, self.plans = weights, stored, config, plans
        self.group, self.indices, self.rule = group, indices, config.dense_rule
        self.mesh = weights[0].device_mesh if isinstance(weights[0], DTensor) else None
        self.pieces = team_of(weights[0])
        self.device, self.shapes = weights[0].device, [weight.shape for weight in weights]
        held = [{key: local(tensor) for key, tensor in one.items()} for one in stored]
        self.views = [View(one, plan.buffers, plan.encodings) for one, plan in zip(held, plans, strict=True)]

    @property
    @override
    def ready(self) -> bool:
        return any([has_gradient(p, shape) for p, shape in zip(self.weights, self.shapes, strict=True)])

    @override
    def marks(self) -> list[int]:
        return [2 * int(s["step"]) + (p.grad is not None) for s, p in zip(self.stored, self.weights, strict=True)]

    @override
    def look(self) -> list[Tensor]:
        return [self._grad(i) for i in self._todo()]

    def _todo(self) -> list[int]:
        """Return which tensors have a gradient, and any elements."""
        return [i for i, p in enumerate(self.weights) if p.grad is not None and p.numel()]

    @override
    def step_(self) -> Work[None]:
        todo = self._todo()
        finite = yield Reading(self.look())
        together, good = [], [i for i, flag in zip(todo, finite, strict=True) if flag]
        for i in (i for i in todo if i not in good):
            self.stored[i]["skipped"].add_(1)
        for i in good:
            if not self.rule.elementwise:
                yield from self._step_whole(i)
            elif self.weights[i].dtype == torch.float32 and self.views[i].plain:
                together.append(i)
            else:
                self._step_in_blocks(i)
        if together:
            weights, grads = [self._here(self.weights[i]) for i in together], [self._grad(i).float() for i in together]
            states, contexts = [self.views[i].stored for i in together], [self._context(i) for i in together]
            self.rule.dense_step_(weights, grads, states, contexts)
        for i in good:
            self.stored[i]["step"].add_(1)
            self.stored[i]["moment_step"].add_(1)

    def _step_whole(self, i: int) -> Work[None]:
        """Step a tensor by a rule that looks at all of it, its first axis as columns."""
        W, G, ctx = self._here(self.weights[i]), self._grad(i).float(), self._context(i)
        with self.views[i].writing() as s:
            rule = self.rule.update(s, G.flatten(1).mT if G.dim() > 1 else G.reshape(-1), ctx)
            N = yield from asking(rule, {"columns": self.pieces})
            step = (N.mT if G.dim() > 1 else N).reshape(W.shape)
            image = W.float()
            image.mul_(1 - ctx.lr * ctx.weight_decay).sub_(step, alpha=ctx.lr * self.rule.step_scale(ctx))
            if image is not W:
                ctx.rounding(W.device).store_(W, image)

    def _step_in_blocks(self, i: int) -> None:
        """Step a tensor of low precision or with encoded state: cast, step, round, some rows at a time if possible."""
        rule, W, G, ctx = self.rule, self._here(self.weights[i]), self._grad(i), self._context(i)
        if not W.numel():  # this process has nothing of it
            return
        rounding = ctx.rounding(W.device)
        if not W.is_contiguous() or not W.dim():
            image = W.float()
            with self.views[i].writing() as s:
                rule.dense_step_([image], [G.float()], [s], [ctx])
            rounding.store_(W, image)
            return
        row = W[0].numel()
        for start, length in kernels.blocks(W.view(len(W), row).mT):
            image = W.narrow(0, start, length).float()
            with self.views[i].narrow(start, length).writing() as s:
                rule.dense_step_([image], [G.narrow(0, start, length).float()], [s], [ctx])
            if W.dtype != torch.float32:  # an image of its own
                rounding.store_(W.narrow(0, start, length).view(-1), image.view(-1), start * row)

    def _here(self, tensor: Tensor) -> Tensor:
        """Return this process's piece."""
        return tensor if self.mesh is None else local(tensor)

    def _grad(self, i: int) -> Tensor:
        return self._here(gradient_of(self.weights[i]))  # it may be kept in another type than its weight

    def _context(self, i: int) -> Context:
        weight = self.weights[i]
        ctx = context_of(
            self.stored[i],
            self.config,
            self.group,
            self.indices[i],
            self.plans[i].columns,
            number=0,
            written=False,
            m=0,
            r=0,
            place=self.pieces.rank if self.pieces else 0,
            device=weight.device,
            weight=weight,
        )
        # the rate of matrices that are stepped whole is a multiple of the group's; decay is not
        return ctx._replace(lr=ctx.lr * ctx.scale, weight_decay=ctx.weight_decay / ctx.scale)
