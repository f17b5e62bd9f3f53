"""The options of the baselines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from recipes.shared.baselines.adapters import KINDS
from recipes.shared.baselines.table import BASELINES


NAMES = tuple(BASELINES)


@dataclass
class BaselineArguments:
    """Which baseline, and its hyper-parameters. The defaults are those of the pretraining tables (GaLore, App. C)."""

    baseline: Literal[NAMES] | None = field(
        default=None, metadata={"help": "Train this instead of the low-rank optimizer that --optim names."}
    )
    adapter_kind: str = field(default="lora", metadata={"help": f"LoRA in all forms: {', '.join(KINDS)}."})
    adapter_rank: int = field(default=128, metadata={"help": "Rank of the factors, or of LoRA with as many numbers."})
    adapter_alpha: float = field(
        default=32.0, metadata={"help": "LoRA in all forms, sltrain: W0 + (alpha / rank) B A."}
    )
    adapter_dropout: float = field(default=0.05, metadata={"help": "All adapters but sparse: dropout before A, or M."})
    velora_groups: int = field(
        default=64, metadata={"help": "--adapter_kind velora: groups of the input, one number each."}
    )
    adapter_targets: str | None = field(
        default=None,
        metadata={
            "help": "All that change the model: modules, as --optim_target_modules spells them. Default: those that a "
            "low-rank optimizer would project."
        },
    )
    sltrain_density: float = field(
        default=0.03, metadata={"help": "sltrain: share of the entries of a matrix that the sparse part holds."}
    )
    welore_reduction: float = field(
        default=0.5, metadata={"help": "welore: share of all singular values that are pruned."}
    )
    zo_eps: float = field(
        default=1e-3, metadata={"help": "mezo, lozo, subzero: length of the moves along a direction."}
    )
    zo_rank: int | None = field(default=None, metadata={"help": "lozo, subzero: rank of a direction. Default: 2, 8."})
    zo_every: int | None = field(
        default=None, metadata={"help": "lozo, subzero: steps from one subspace to the next. Default: 50, 2000."}
    )
    zo_in_place: bool = field(
        default=False, metadata={"help": "mezo, lozo, subzero: no copy of the weights; in fp32 alone, as they drift."}
    )
    relora_every: int = field(
        default=1000, metadata={"help": "relora, remora, plora: steps from one merge to the next."}
    )
    relora_warmup: int = field(default=50, metadata={"help": "relora, remora: steps of warm-up after a merge."})
    cola_links: int = field(default=3, metadata={"help": "cola: links of the chain, of equal length."})
    plora_momentum: float = field(
        default=0.0, metadata={"help": "plora: share of the adapter that a merge leaves where it is."}
    )
    mora_type: int = field(
        default=6,
        metadata={
            "help": "mora: 1 (large ranks) or 2 share, 6 (small ranks) turns. remora goes from 1 to 2 and back."
        },
    )
