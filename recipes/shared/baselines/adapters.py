"""Adapters that peft has."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


ADAPTER = "default"
"""peft's name of the one adapter there is."""

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
"""peft's options for them: arXiv 2106.09685, 2312.03732, 2402.09353, 2404.02948, 2406.01775."""

FACTOR = re.compile(r"\.lora_([AB]|magnitude_vector)\.|\.(down|up)_factor\b|\.(sparse_values|square_factor)$")
"""Names of the parameters that stand in for a matrix: peft's, and those of the modules beside this one."""


def lora_(model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str, seed: int) -> None:
    """Put adapters of `args.adapter_kind` into a model; the first factors are drawn by the global generator."""
    if args.adapter_kind not in KINDS:
        raise ValueError(f"--adapter_kind must be one of {', '.join(KINDS)}, not {args.adapter_kind!r}")
    add_lora_(model, targets, args, also_train=also_train)


def add_lora_(model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str) -> None:
    """Put peft's LoRA layers into a model; base weights are frozen, and what `also_train` does not find."""
    config = LoraConfig(
        r=args.adapter_rank,
        lora_alpha=args.adapter_alpha,
        lora_dropout=args.adapter_dropout,
        target_modules=targets,
        **KINDS[args.adapter_kind],
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    freeze_outside_(model, also_train)


def freeze_outside_(model: nn.Module, also_train: str) -> None:
    """Let what stands in for matrices train, and outside of it what `also_train` finds; all else is frozen."""
    for name, p in model.named_parameters():
        if not FACTOR.search(name):
            p.requires_grad = ".base_layer." not in name and re.search(also_train, name) is not None


def merged(layer: BaseTunerLayer) -> nn.Module:
    """Return the layer under an adapter of peft with the adapter merged into it, in fp32: bf16 rounds once."""
    plain: nn.Module = layer.get_base_layer()
    dtype = plain.weight.dtype
    layer.float().merge(adapter_names=[ADAPTER])
    return plain.to(dtype)
