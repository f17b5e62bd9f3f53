"""The table: a name of --baseline, and what it does to a model and its training arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from recipes.shared.baselines.adapters import lora_, sparse_
from recipes.shared.baselines.factorized import low_rank_
from recipes.shared.baselines.mora import mora_
from recipes.shared.baselines.quantized import qlora_
from recipes.shared.baselines.restarts import cola, plora, relora
from recipes.shared.baselines.sparse_low_rank import sltrain_
from recipes.shared.baselines.welore import welore_
from recipes.shared.baselines.without_gradients import zeroth_order


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


Stage = Literal["pretraining", "fine-tuning"]


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
        trainer: what is called in the place of Trainer; None is Trainer.
        only_for: what it makes sense for, where that is not everything; None is everything.
    """

    title: str
    optim: str = "adamw_torch_fused"
    only_optim: bool = False
    adapt_: Adapt | None = None
    callback: Callable[[BaselineArguments, TrainingArguments], TrainerCallback] | None = None
    trainer: Callable[[BaselineArguments], Callable[..., Trainer]] | None = None
    only_for: Stage | None = None


def _without_gradients(title: str) -> Baseline:
    return Baseline(title, "sgd", only_optim=True, trainer=zeroth_order, only_for="fine-tuning")


BASELINES = {
    "adamw": Baseline("AdamW, torch's", only_optim=True),
    "adamw_8bit": Baseline("8-bit AdamW, bitsandbytes' (arXiv 2110.02861)", "adamw_bnb_8bit", only_optim=True),
    "adamw_4bit": Baseline("4-bit AdamW, torchao's (arXiv 2309.01507)", "adamw_torch_4bit", only_optim=True),
    "paged_adamw": Baseline("AdamW in paged memory, bitsandbytes'", "paged_adamw_32bit", only_optim=True),
    "paged_adamw_8bit": Baseline("8-bit AdamW in paged memory, bitsandbytes'", "paged_adamw_8bit", only_optim=True),
    "lora": Baseline("LoRA and its kinds, peft's (arXiv 2106.09685)", adapt_=lora_),
    "relora": Baseline("ReLoRA (arXiv 2307.05695)", adapt_=lora_, callback=relora),
    "sparse": Baseline("SHiRA: a sparse adapter, peft's (arXiv 2406.13175)", adapt_=sparse_),
    "qlora": Baseline(
        "QLoRA: LoRA on 4-bit weights, bitsandbytes' and peft's (arXiv 2305.14314)",
        "paged_adamw_32bit",
        adapt_=qlora_,
        only_for="fine-tuning",
    ),
    "cola": Baseline("COLA: a chain of LoRA (arXiv 2401.04151)", adapt_=lora_, callback=cola),
    "plora": Baseline("PLoRA: periodic LoRA (arXiv 2402.16141)", adapt_=lora_, callback=plora),
    "mora": Baseline("MoRA: a square matrix (arXiv 2405.12130)", adapt_=mora_),
    "remora": Baseline("ReMoRA: MoRA with ReLoRA's merges (arXiv 2405.12130)", adapt_=mora_, callback=relora),
    "low_rank": Baseline("low-rank factors in place of the matrices (arXiv 2209.13569)", adapt_=low_rank_),
    "sltrain": Baseline("SLTrain: low-rank and sparse (arXiv 2406.02214)", adapt_=sltrain_, only_for="pretraining"),
    "welore": Baseline(
        "WeLore: what is nearly of low rank becomes it, and trains (arXiv 2407.11239)",
        adapt_=welore_,
        only_for="fine-tuning",
    ),
    "mezo": _without_gradients("MeZO: two losses along a random direction (arXiv 2305.17333)"),
    "lozo": _without_gradients("LOZO: directions of low rank (arXiv 2410.07698)"),
    "subzero": _without_gradients("SubZero: directions in a random subspace (arXiv 2410.08989)"),
}


def fit_for(stage: Stage) -> tuple[str, ...]:
    """Return the names of the baselines that make sense for a stage."""
    return tuple(name for name, baseline in BASELINES.items() if baseline.only_for in (None, stage))
