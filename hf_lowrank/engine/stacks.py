"""Matrices of one shape that step as one on an accelerator, which would otherwise wait for many small kernels.

What is small (moments, norms, factors of columns) lies in one tensor for all of them, of which the state of each has a
view: checkpoints know nothing of it. What is large (gradients, weights, the products with them) is done one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from hf_lowrank.engine import step
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.engine.step import SYNC_ELEMENTS
from hf_lowrank.engine.unit import Unit
from hf_lowrank.methods.context import Context, Update
from hf_lowrank.state.slots import Stored
from hf_lowrank.tensors.bases import Basis
from hf_lowrank.tensors.several import Several


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
        self.lasting, self.rests = False, True  # a refresh changes the basis of one member

    @property
    @override
    def transient(self) -> int:
        return len(self.members) * super().transient

    def agrees(self, flags: Mapping[Unit, Sequence[bool]]) -> bool:
        """Tell whether all of them have a finite gradient, that none has begun to step, and have had as many steps."""
        first = self.members[0].stored
        return all(
            member.started is None
            and all(flags.get(member, (False,)))
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
        if self.basis is None:
            self.basis = Several.of([member.basis_in_use() for member in self.members])
        return self.basis

    @override
    def _write_(self, basis: Basis, G: Any, update: Update, c_t: float, ctx: Context) -> None:
        assert isinstance(basis, Several)
        Z = update.Z
        if Z is not None:
            basis, Z = basis.factors(Z, self.weight)
        none = [None] * len(self.members)
        columns = zip(
            self.members,
            basis.bases,
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
        self._done_()


def stacked(units: Sequence[MatrixStep]) -> list[Stack]:
    """Return stacks of two or more of these matrices, as large as a bucket admits, where matrices may be stacked; any
    other leaves the stack that it was in."""
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
    for unit in set(units) - {member for stack in found for member in stack.members}:
        _alone_(unit)
    return found


def _alone_(unit: MatrixStep) -> None:
    """Give a matrix tensors of its own in the place of views of a stack's, whose memory they would keep."""
    for name, tensor in unit.stored.items():
        if tensor.untyped_storage().nbytes() > tensor.nbytes:
            unit.stored[name] = tensor.clone()


def stackable(unit: MatrixStep) -> bool:
    """Tell whether a matrix may step with others: no part looks at more of its gradient than the norms of columns, or
    counts steps by itself."""
    parts, layout = unit.config.parts, unit.layout
    return (
        step.at_once(unit.device)
        and layout.mesh is None
        and not layout.stack
        and unit.view.plain
        and not unit.config.options["layerwise"]
        and not unit.reduced
        and parts.reconstruction.by_columns
        and not parts.moments.needs_weight
        and not parts.subspace.needs_gradient
        and not any(
            slot.shared
            for slot in (*parts.moments.slots(unit.plan.columns).values(), *parts.reconstruction.slots().values())
        )
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
