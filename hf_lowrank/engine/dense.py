"""The step of the parameters that have no subspace: embeddings, norms, biases, heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank.engine.matrix import advance_, context_of
from hf_lowrank.engine.plan import declared_state, dense_columns
from hf_lowrank.methods.context import Context
from hf_lowrank.methods.resolve import Parts
from hf_lowrank.state.slots import Raw
from hf_lowrank.state.view import View
from hf_lowrank.tensors import kernels, rounding
from hf_lowrank.tensors.layout import local
from hf_lowrank.tensors.sums import Summing


class DenseStep:
    """The step of all dense parameters of one group: the same moments with no subspace."""

    transient = 0

    def __init__(
        self, weights: list[Tensor], raws: list[Raw], parts: Parts, group: Mapping[str, Any], indices: list[int]
    ) -> None:
        self.weights, self.rule, self.group, self.indices = weights, parts.moments.dense, group, indices
        self.mesh = next((w.device_mesh for w in weights if isinstance(w, DTensor)), None)
        self.device = weights[0].device
        self.views = []
        for weight, raw in zip(weights, raws, strict=True):
            held = {name: local(tensor) for name, tensor in raw.items()}
            self.views.append(View(held, *declared_state(weight, parts, group)))

    def measure(self) -> Summing[list[Tensor]]:
        """Return the gradients."""
        yield from ()
        return [local(w.grad) for w in self.weights if w.grad is not None]

    def step_(self, finite: Sequence[bool]) -> Summing[None]:
        """Step the parameters whose gradient is finite; count the others as skipped."""
        together = []
        for i, (weight, s) in enumerate(zip(self.weights, self.views, strict=True)):
            if not finite[i]:
                s["skipped"].add_(1)
            elif not self.rule.elementwise:
                yield from self._step_whole(i)
            elif weight.dtype == torch.float32 and s.plain():
                together.append(i)
            else:
                self._step_in_blocks(i)
        if together:
            weights, grads = [local(self.weights[i]) for i in together], [self._grad(i).float() for i in together]
            states, contexts = [self.views[i] for i in together], [self._context(i) for i in together]
            self.rule.dense_step_(weights, grads, states, contexts)
        for s, good in zip(self.views, finite, strict=True):
            if good:
                advance_(s)

    def _step_whole(self, i: int) -> Summing[None]:
        """Step a tensor by a rule that looks at all of it, its first axis as columns."""
        W, G, s, ctx = local(self.weights[i]), self._grad(i).float(), self.views[i], self._context(i)
        N = yield from self.rule.update(s, G.flatten(1).mT if G.dim() > 1 else G.reshape(-1), ctx)
        step = (N.mT if G.dim() > 1 else N).reshape(W.shape)
        image = W.float()
        image.mul_(1 - ctx.lr * ctx.weight_decay).sub_(step, alpha=ctx.lr * self.rule.step_scale(ctx))
        if image is not W:
            rounding.round_(W, image, ctx.rounding(W.device))
        s.commit("moment", "variance")

    def _step_in_blocks(self, i: int) -> None:
        """Step a tensor of low precision or with encoded state: cast, step, round, one block at a time if possible."""
        rule, W, G, s, ctx = self.rule, local(self.weights[i]), self._grad(i), self.views[i], self._context(i)
        gen = ctx.rounding(W.device)
        if not W.is_contiguous():
            image = W.float()
            rule.dense_step_([image], [G.float()], [s], [ctx])
            rounding.round_(W, image, gen)
            s.commit("moment", "variance")
            return
        flat, grad = W.view(-1), G.reshape(-1)
        for start, length in kernels.blocks(flat.shape):
            part, image = s.narrow(start, length), flat.narrow(0, start, length).float()
            rule.dense_step_([image], [grad.narrow(0, start, length).float()], [part], [ctx])
            part.commit("moment", "variance")
            rounding.round_(flat.narrow(0, start, length), image, gen)

    def _grad(self, i: int) -> Tensor:
        grad = self.weights[i].grad
        assert grad is not None
        return local(grad)  # it may be kept in another type than its weight

    def _context(self, i: int) -> Context:
        weight = self.weights[i]
        place = weight.device_mesh.get_local_rank() if isinstance(weight, DTensor) else 0
        return context_of(
            self.views[i],
            self.group,
            self.indices[i],
            dense_columns(tuple(weight.shape)),
            number=0,
            m=0,
            r=0,
            split="columns" if isinstance(weight, DTensor) else "",
            offset=place,
            device=weight.device,
        )
