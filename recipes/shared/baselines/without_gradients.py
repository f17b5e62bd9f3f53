"""The zeroth-order baselines: which directions, and the Trainer that measures along them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from transformers import Trainer

from recipes.shared.zeroth_order import ZerothOrderTrainer, full, lozo, subzero


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


DRAWS = {"mezo": lambda **_: full, "lozo": lozo, "subzero": subzero}
USUAL = {"mezo": (1, 1), "lozo": (2, 50), "subzero": (8, 2000)}
"""Rank and steps from one subspace to the next, by the authors' code."""


def zeroth_order(args: BaselineArguments) -> Callable[..., Trainer]:
    """Return what is called in the place of Trainer."""
    name = str(args.baseline)
    rank, every = USUAL[name]
    rank, every = (
        usual if given is None else given for given, usual in ((args.zo_rank, rank), (args.zo_every, every))
    )
    for option, value in (("zo_rank", rank), ("zo_every", every)):
        if value < 1:
            raise ValueError(f"--{option} must be at least 1, not {value}")
    draw = DRAWS[name](rank=rank, every=every)
    return partial(ZerothOrderTrainer, draw=draw, eps=args.zo_eps, in_place=args.zo_in_place)
