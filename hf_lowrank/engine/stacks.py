"""Matrices of one shape that step as one on an accelerator, which would otherwise wait for many small kernels.

What is small (moments, norms, factors of columns) lies in one tensor for all of them, of which the state of each has a
view: checkpoints know nothing of it. What is large (gradients, weights, the products with them) is done one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.engine import step
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.engine.step import SYNC_ELEMENTS, Unit
from hf_lowrank.methods.context import Context
from hf_lowrank.methods.parts import Update
from hf_lowrank.state.slots import Stored
from hf_lowrank.tensors import products
from hf_lowrank.tensors.bases import Basis, Dense


class Stack(MatrixStep):
    """The step of several matrices of one group, shape and configuration, each with a state of its own.

    Args:
        members: their steps; their states become views of one tensor for each slot.
    """

    def __init__(self, members: Sequence[MatrixStep]) -> None:
        first = members[0]
        self.members = members
        shared = {name for name, buffer in first.plan.buffers.items() if buffer.slot.shared}
        stored: Stored = {name: tensor for name, tensor in first.stored.items() if name in shared}
        for name in first.stored.keys() - shared:
            stored[name] = torch.stack([member.stored[name] for member in members])
            for member, tensor in zip(members, stored[name].unbind(0), strict=True):
                member.stored[name] = tensor
        super().__init__(first.weight, stored, first.config, first.plan, first.group, first.index)

    @property
    @override
    def transient(self) -> int:
        return len(self.members) * super().transient

    def agrees(self, flags: Mapping[Unit, Sequence[bool]]) -> bool:
        """Tell whether all of them have a finite gradient and have had as many steps."""
        first = self.members[0].stored
        return all(
            all(flags.get(member, (False,)))
            and member.stored["step"] == first["step"]
            and member.stored["moment_step"] == first["moment_step"]
            for member in self.members
        )

    @property
    @override
    def gradient(self) -> Any:
        return [member.gradient for member in self.members]

    @override
    def column_norms(self) -> Tensor | None:
        known = [member.norms for member in self.members if member.norms is not None]
        return torch.stack(known) if len(known) == len(self.members) else None

    @override
    def basis_in_use(self) -> Basis:
        bases = [member.basis_in_use() for member in self.members]
        P = None
        if all(isinstance(basis, Dense) for basis in bases):
            given = [basis.P for basis in bases]  # type: ignore[attr-defined]
            if all(one is given[0] for one in given):  # a sketch that they share
                P = given[0].expand(len(given), *given[0].shape)
            elif all(one is member.stored.get("basis") for one, member in zip(given, self.members, strict=True)):
                P = self.stored["basis"]
        return Several(bases, P)

    @override
    def _write_(self, basis: Basis, G: Any, update: Update, c_t: float, ctx: Context) -> None:
        assert isinstance(basis, Several)
        bases, Z = basis.factors(update.Z, self.weight)
        none = [None] * len(self.members)
        columns = zip(
            self.members,
            bases,
            none if G is None else G,
            none if Z is None else Z.unbind(0),
            none if update.d is None else update.d.unbind(0),
            strict=True,
        )
        for member, own, gradient, coefficients, d in columns:
            keyed = ctx._replace(key=(ctx.key[0], member.index))
            member._write_(own, gradient, Update(coefficients, update.alpha, d), c_t, keyed)

    @override
    def _advance_(self) -> None:
        for member in self.members:
            member._advance_()


@dataclass(frozen=True)
class Several(Basis):
    """The bases of the matrices of a stack, whose gradients lie in memory of their own: R is (k, r, n).

    Attributes:
        bases: one for each matrix.
        P: (k, m, r) if they are matrices that lie in one tensor, else None.
    """

    bases: Sequence[Basis]
    P: Tensor | None

    @override
    def project(self, G: Any) -> Tensor:
        if self.P is None:
            return torch.stack([basis.project(one) for basis, one in zip(self.bases, G, strict=True)])
        kind = products.chosen(self.bases[0].products, G[0])  # type: ignore[attr-defined]
        A = products.left_factor(self.P, kind)
        out = torch.empty(len(G), A.shape[-1], G[0].shape[-1], dtype=torch.float32, device=A.device)
        for product, factor, one in zip(out.unbind(0), A.unbind(0), G, strict=True):
            products.multiply_(product, factor, one, kind)
        return products.joined(out, kind)

    def factors(self, Z: Tensor | None, W: Tensor) -> tuple[Sequence[Basis], Tensor | None]:
        """Return bases and coefficients for the write, rounded at once where they are rounded to be multiplied."""
        if self.P is None or Z is None:
            return self.bases, Z
        kind = self.bases[0].products  # type: ignore[attr-defined]
        if not products.chosen(kind, W).startswith("bf16"):
            return self.bases, Z
        return [Dense(P, kind) for P in self.P.bfloat16().unbind(0)], Z.bfloat16()

    @override
    def gram(self) -> Tensor:
        return torch.stack([basis.gram() for basis in self.bases])

    @override
    def add_(self, W: Tensor, Z: Tensor, *, beta: float, alpha: float) -> None:
        raise TypeError("every matrix of a stack is written by its own basis")

    @override
    def rows(self, start: int, length: int) -> Several:
        P = None if self.P is None else self.P.narrow(-2, start, length)
        return Several([basis.rows(start, length) for basis in self.bases], P)


def stacked(units: Iterable[MatrixStep]) -> list[Stack]:
    """Return stacks of two or more of these matrices, as large as a bucket admits, where matrices may be stacked."""
    alike: dict[Any, list[MatrixStep]] = {}
    for unit in units:
        if stackable(unit):
            W, plan = unit.weight, unit.plan
            key = (W.shape, W.dtype, W.device, id(unit.group), plan.layout, plan.columns)
            alike.setdefault(key, []).append(unit)
    found = []
    for some in alike.values():
        size = max(1, SYNC_ELEMENTS // some[0].transient)
        found += [Stack(some[i : i + size]) for i in range(0, len(some), size) if len(some[i : i + size]) > 1]
    return found


def stackable(unit: MatrixStep) -> bool:
    """Tell whether a matrix may step with others: no part looks at more of its gradient than the norms of columns."""
    parts, layout = unit.config.parts, unit.layout
    return (
        step.at_once(unit.device)
        and not layout.along
        and not layout.stack
        and unit.view.plain
        and not unit.config.options["layerwise"]
        and parts.reconstruction.by_columns
        and not parts.subspace.needs_gradient
    )


def gathered(units: Sequence[Unit], stacks: Iterable[Stack], flags: dict[Unit, list[bool]]) -> list[Unit]:
    """Return the units with stacks in the place of their members, wherever all members agree.

    Args:
        units: what is stepped.
        stacks: all that there are.
        flags: what is known of the gradients of units; that of a stack is added.
    """
    place: dict[Unit, Unit] = {}
    for stack in stacks:
        if stack.agrees(flags):
            flags[stack] = [True]
            place |= dict.fromkeys(stack.members, stack)
    return list(dict.fromkeys(place.get(unit, unit) for unit in units))
