"""The table: a name of --baseline, and what it does to a model and its training arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import nn
from transformers import TrainerCallback

from recipes.shared.baselines.adapters import lora_
from recipes.shared.baselines.factorized import low_rank_
from recipes.shared.baselines.restarts import relora


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


class Adapt(Protocol):
    """Replaces modules of a model in place; what else trains is what `also_train` finds."""

    def __call__(
        self, model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str, seed: int
    ) -> None:
        """Replace `targets`, names of modules; random numbers follow from `seed` alone."""


@dataclass(frozen=True)
class Baseline:
    """What a name of --baseline does.

    Attributes:
        title: what it is, and where it comes from.
        optim: the value of --optim that it trains with, where --optim names a low-rank optimizer.
        only_optim: whether it trains with `optim` whatever --optim names.
        adapt_: what it does to the model; None leaves it as it is.
        callback: what the Trainer needs beside.
    """

    title: str
    optim: str = "adamw_torch_fused"
    only_optim: bool = False
    adapt_: Adapt | None = None
    callback: Callable[[BaselineArguments], TrainerCallback] | None = None


BASELINES = {
    "adamw": Baseline("AdamW, torch's", only_optim=True),
    "adamw_8bit": Baseline("8-bit AdamW, bitsandbytes' (arXiv 2110.02861)", "adamw_bnb_8bit", only_optim=True),
    "lora": Baseline("LoRA and its kinds, peft's (arXiv 2106.09685)", adapt_=lora_),
    "relora": Baseline("ReLoRA (arXiv 2307.05695)", adapt_=lora_, callback=relora),
    "low_rank": Baseline("low-rank factors in place of the matrices (arXiv 2209.13569)", adapt_=low_rank_),
}
