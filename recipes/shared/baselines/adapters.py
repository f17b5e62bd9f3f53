"""Adapters that peft has."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import peft
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


ADAPTER = "default"
"""peft's name of the one adapter there is."""


def _newer(name: str, option: str) -> Any:
    """Return a class that the oldest peft that is supported lacks."""
    if not hasattr(peft, name):
        raise ValueError(f"{option} needs a newer peft than {peft.__version__}: pip install -U peft")
    return getattr(peft, name)


def _velora(args: BaselineArguments) -> dict[str, Any]:
    """VeLoRA: of the input of A the backward pass keeps one number per group and token.

    The direction of the groups is the batch's mean at every step: peft does not save that the mean of the first batch
    has been taken, as the paper has it, and a resumed run would take another.
    """
    config = _newer("VeloraConfig", "--adapter_kind velora")
    if args.velora_groups < 1:
        raise ValueError(f"--velora_groups must be at least 1, not {args.velora_groups}")
    return {"velora_config": config(num_groups=args.velora_groups, init_type="batch_average")}


KINDS: dict[str, Callable[[BaselineArguments], dict[str, Any]]] = {
    "lora": lambda args: {},
    "rslora": lambda args: {"use_rslora": True},
    "dora": lambda args: {"use_dora": True},
    "pissa": lambda args: {"init_lora_weights": "pissa"},
    "olora": lambda args: {"init_lora_weights": "olora"},
    "velora": _velora,
}
"""peft's options for them: arXiv 2106.09685, 2312.03732, 2402.09353, 2404.02948, 2406.01775, 2405.17991."""

FACTOR = re.compile(
    r"\.lora_([AB]|magnitude_vector)\.|\.(down|up)_factor\b|\.(sparse_values|square_factor)$|\.shira_weight\."
)
"""Names of the parameters that stand in for a matrix: peft's, and those of the modules beside this one."""


def lora_(model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str, seed: int) -> None:
    """Put adapters of `args.adapter_kind` into a model; the first factors are drawn by the global generator."""
    if args.adapter_kind not in KINDS:
        raise ValueError(f"--adapter_kind must be one of {', '.join(KINDS)}, not {args.adapter_kind!r}")
    for name in targets if args.adapter_kind in ("pissa", "olora") else ():
        if args.adapter_rank > (short := min(model.get_submodule(name).weight.shape)):
            raise ValueError(
                f"--adapter_kind {args.adapter_kind} starts from the matrix itself, and {name} has a short side of "
                f"{short}: --adapter_rank {args.adapter_rank} must not be above it"
            )
    add_lora_(model, targets, args, also_train=also_train)


def add_lora_(model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str) -> None:
    """Put peft's LoRA layers into a model; base weights are frozen, and what `also_train` does not find."""
    config = LoraConfig(
        r=args.adapter_rank,
        lora_alpha=args.adapter_alpha,
        lora_dropout=args.adapter_dropout,
        target_modules=targets,
        **KINDS[args.adapter_kind](args),
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    freeze_outside_(model, also_train)


def sparse_(model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str, seed: int) -> None:
    """Put peft's SHiRA into a model: as many numbers as LoRA has, at places of the matrix that follow from the seed.

    Checkpoints hold the numbers, not their places: a run is resumed with the seed that it was started with.
    """
    for name in targets:
        m, n = model.get_submodule(name).weight.shape
        if args.adapter_rank * (m + n) > m * n:
            raise ValueError(
                f"--adapter_rank {args.adapter_rank} of sparse asks for {args.adapter_rank * (m + n):,} entries of "
                f"{name}, which has {m * n:,}; {m * n // (m + n)} is the most"
            )
    config = _newer("ShiraConfig", "--baseline sparse")(r=args.adapter_rank, random_seed=seed, target_modules=targets)
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    freeze_outside_(model, also_train)


def freeze_outside_(model: nn.Module, also_train: str) -> None:
    """Let what stands in for matrices train, and outside of it what `also_train` finds; all else is frozen."""
    for name, p in model.named_parameters():
        if not FACTOR.search(name):
            p.requires_grad = ".base_layer." not in name and re.search(also_train, name) is not None
            p.requires_grad &= p.is_floating_point()  # 4-bit weights are not


def merged(layer: BaseTunerLayer) -> nn.Module:
    """Return the layer under an adapter of peft with the adapter merged into it, in fp32: bf16 rounds once."""
    plain: nn.Module = layer.get_base_layer()
    dtype = plain.weight.dtype
    if isinstance(layer, LoraLayer) and not isinstance(layer, Linear):  # its own merge would round to 4 bits again
        plain.weight.data += layer.get_delta_weight(ADAPTER)
    else:
        layer.float().merge(adapter_names=[ADAPTER])
    return plain.to(dtype)
