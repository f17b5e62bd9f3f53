"""Dominant first, blind at the end: GoLore."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from hf_lowrank.methods.context import Context
from hf_lowrank.methods.options import choice, integer, number
from hf_lowrank.methods.subspaces.decomposed import EXACT, Decomposed
from hf_lowrank.methods.subspaces.dominant import dominant
from hf_lowrank.methods.subspaces.random import Random
from hf_lowrank.state.slots import State


@dataclass(frozen=True)
class GoLore(Decomposed, key="golore"):
    """P = U[:, :r] up to the share `switch_at` of the run, then uniform on the Stiefel manifold.

    The leading singular vectors of a noisy gradient are those of its noise once the signal is small; a random basis
    has E[P P^T] = (r/m) I whatever the noise. Counted are the parameter's own updates: where layers
    take turns each has fewer, and `total_steps` is to be theirs. M is projected onto each new basis, V stays. The rows
    `golore_*` have scale 1, as its pretraining scripts do; those for fine-tuning have 4, at rank 4.

    References:
        GoLore, arXiv 2410.11289, Algorithm 1 and section 5 (GoLore@20%).

    Differs from the authors' code: the projected momentum is written back; thin QR in place of an n x n SVD; the
    switch is a share of the run's real number of steps, which Trainer knows.
    """

    on_refresh: ClassVar[str] = "rotate"

    refresh: str = choice(*EXACT, help="how the leading vectors are found, both in float64")
    switch_at: float = number(0.8, help="GoLore: share of the steps after which bases are random; 1 or more: never")
    total_steps: int | None = integer(
        None, minimum=1, help="GoLore: steps of the whole run; Trainer sets it", fact="total_steps"
    )

    @override
    def choose(self, s: State, G: Tensor, ctx: Context) -> tuple[Tensor, Tensor | None]:
        """

        Raises:
            ValueError: if the number of steps is not known.
        """
        if self.switch_at < 1 and self.total_steps is None:
            raise ValueError(
                "golore switches at a share of the run: set total_steps=<optimizer steps of the whole run>"
            )
        if self.switch_at < 1 and ctx.step >= self.switch_at * (self.total_steps or 0):
            return Random().choose(s, G, ctx)
        return dominant(G, s["basis"], self.refresh, ctx)
