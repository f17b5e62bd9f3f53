"""Three parts together: what they are as one, and which do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_lowrank.methods.common import OFFLOAD


if TYPE_CHECKING:
    from hf_lowrank.methods.parts import Moments, Reconstruction, Subspace


@dataclass(frozen=True)
class Parts:
    """A method with its options filled in; its repr is the configuration."""

    subspace: Subspace
    moments: Moments
    reconstruction: Reconstruction

    @property
    def needs_gradient(self) -> bool:
        """Whether the gradient must live until the weight is written, so that layerwise updates in the hook."""
        return self.subspace.needs_gradient or self.reconstruction.needs_gradient

    @property
    def replaces_gradient(self) -> bool:
        """Whether a refresh looks at another matrix than the gradient."""
        return self.subspace.replaces_gradient or self.reconstruction.replaces_gradient

    @property
    def reads_norms(self) -> bool:
        """Whether a step begins by looking at the norm of every column of R, which is the gradient."""
        return self.subspace.whole and self.reconstruction.needs_gradient and self.reconstruction.by_columns

    @property
    def direct(self) -> bool:
        """Whether nothing stands between the moments of every element and the weight."""
        return self.subspace.whole and self.moments.elementwise and self.reconstruction.plain


def check_together(made: Parts, options: Mapping[str, Any]) -> None:
    """Refuse parts and options that do not go together.

    Raises:
        ValueError: in one sentence.
    """
    if made.needs_gradient and options["max_grad_norm"] and options["layerwise"] != OFFLOAD:
        raise ValueError("it steps along the gradient itself, not along its projection alone: set max_grad_norm=0")
    if made.needs_gradient and options.get("reduce_projected"):
        raise ValueError(
            "its step needs the gradient itself, not its projection alone, so whole gradients have to be averaged: "
            "leave out reduce_projected"
        )
    if (made.subspace.needs_momentum or made.reconstruction.needs_momentum) and not made.moments.keeps_momentum:
        raise ValueError("a part looks at the momentum, and these moments keep none: choose moments=momentum or adam")
    if (made.subspace.needs_momentum or made.reconstruction.needs_momentum) and not made.moments.of_gradients:
        raise ValueError(
            "a part weighs the momentum against gradients, and that of these moments is of normalised updates: choose "
            "moments=momentum or adam"
        )
    if made.reconstruction.needs_orthonormal and not made.subspace.orthonormal:
        raise ValueError(
            "its step takes what the basis leaves out of the gradient, and the columns of this basis are not "
            "orthonormal: choose another subspace, such as subspace=dominant"
        )
    if made.reconstruction.scales_residual and (code := options.get("basis_format", "fp32")) != "fp32":
        raise ValueError(
            f"it brings what the basis leaves out of the gradient to a size of its own, and a basis in {code} leaves "
            "out some of the subspace as well: use basis_format=fp32"
        )
    if "rank" in options:
        made.subspace.check_rank(options["rank"])
    if ahead := options.get("async_refresh"):
        if ahead >= (gap := options["update_proj_gap"]):
            raise ValueError(f"async_refresh must be less than update_proj_gap, {gap}, got {ahead}")
        if made.reconstruction.needs_momentum:
            raise ValueError("a part looks at the gradient as bases are adopted: leave out async_refresh")
    how = options.get("on_refresh", "keep")
    if how not in made.moments.transports:
        valid = ", ".join(made.moments.transports)
        raise ValueError(f"option on_refresh must be one of {valid} for these moments, got {how!r}")
    if options.get("proj_type") == "full" and (made.needs_gradient or not made.moments.elementwise):
        raise ValueError("proj_type=full needs a method that steps by Adam or momentum in the subspace alone: use std")
