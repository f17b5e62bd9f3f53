"""The step of the parameters that have no subspace: embeddings, norms, biases, heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_lowrank import linalg
from hf_lowrank.allocation import declared_state
from hf_lowrank.formats import Raw
from hf_lowrank.matrices import local
from hf_lowrank.methods import Parts
from hf_lowrank.parts import Context
from hf_lowrank.state import View
from hf_lowrank.steps import advance_, context


class DenseStep:
    """The step of all dense parameters of one group: the same moments with no subspace."""

    transient = 0
    due = False

    def __init__(
        self, weights: list[Tensor], raws: list[Raw], parts: Parts, group: Mapping[str, Any], indices: list[int]
    ) -> None:
        self.weights, self.parts, self.group, self.indices = weights, parts, group, indices
        self.mesh = next((w.device_mesh for w in weights if isinstance(w, DTensor)), None)
        self.device = weights[0].device
        self.views = []
        for weight, raw in zip(weights, raws, strict=True):
            held = {name: local(tensor) for name, tensor in raw.items()}
            self.views.append(View(held, *declared_state(weight, parts, group)))

    def measure(self) -> list[Tensor]:
        """Return the gradients."""
        return [local(w.grad) for w in self.weights if w.grad is not None]

    def begin_(self, finite: Sequence[bool]) -> None:
        """Step the parameters whose gradient is finite; count the others as skipped."""
        together = []
        for i, (weight, s) in enumerate(zip(self.weights, self.views, strict=True)):
            if not finite[i]:
                s["skipped"].add_(1)
            elif weight.dtype == torch.float32 and s.plain:
                together.append(i)
            else:
                self._step_in_blocks(i)
        if together:
            rule = self.parts.moments
            weights, grads = [local(self.weights[i]) for i in together], [self._grad(i) for i in together]
            rule.dense_step_(weights, grads, [self.views[i] for i in together], [self._context(i) for i in together])
        for s, good in zip(self.views, finite, strict=True):
            if good:
                advance_(s)

    def finish_(self, total: Tensor | None) -> None:
        """Nothing is left to do."""

    def _step_in_blocks(self, i: int) -> None:
        """Step a tensor of low precision or with encoded state: cast, step, round, one block at a time if possible."""
        rule, W, G, s, ctx = self.parts.moments, local(self.weights[i]), self._grad(i), self.views[i], self._context(i)
        gen = ctx.rounding(W.device)
        if not rule.elementwise or not W.is_contiguous():
            image = W.float()
            rule.dense_step_([image], [G.float()], [s], [ctx])
            linalg.round_(W, image, gen)
            s.commit("moment", "variance")
            return
        flat, grad = W.view(-1), G.reshape(-1)
        for start, length in linalg.blocks(flat.shape):
            part, image = s.narrow(start, length), flat.narrow(0, start, length).float()
            rule.dense_step_([image], [grad.narrow(0, start, length).float()], [part], [ctx])
            part.commit("moment", "variance")
            linalg.round_(flat.narrow(0, start, length), image, gen)

    def _grad(self, i: int) -> Tensor:
        grad = self.weights[i].grad
        assert grad is not None
        return local(grad).to(self.weights[i].dtype)  # a gradient may be kept in another type than its weight

    def _context(self, i: int) -> Context:
        weight = self.weights[i]
        offset = weight.device_mesh.get_local_rank() if isinstance(weight, DTensor) else 0
        return context(self.views[i], self.group, self.indices[i], full_rank=True, offset=offset)
