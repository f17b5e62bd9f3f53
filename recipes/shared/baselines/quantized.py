"""QLoRA: LoRA on a base of 4-bit weights, bitsandbytes' and peft's (arXiv 2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig, TrainingArguments

from hf_lowrank.modules import HEADS
from recipes.shared.baselines.adapters import add_lora_
from recipes.shared.baselines.factorized import plain_linear


if TYPE_CHECKING:
    from recipes.shared.baselines.arguments import BaselineArguments


def loading_kwargs(args: BaselineArguments, training_args: TrainingArguments) -> dict[str, Any]:
    """Return what `from_pretrained` must be told for a baseline: QLoRA's base is quantized while it is loaded.

    Normal floats of 4 bits, scales quantized as well, as in the paper; heads stay as they are, for they train. What is
    multiplied is in bf16 on a device that computes so, as in the paper, and in fp32 on a CPU.

    Raises:
        ValueError: if bitsandbytes cannot do this here.
    """
    if args.baseline != "qlora":
        return {}
    device = training_args.device
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        dequantize_4bit(*quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4"))
    except Exception as error:  # no package, no library for this device, no kernel in it: many kinds
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(
            f"--baseline qlora needs bitsandbytes with 4-bit weights on {device}, which failed ({reason}): "
            "pip install -U bitsandbytes, or take --baseline lora"
        ) from None
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        llm_int8_skip_modules=list(HEADS),  # for 4 bits too, in spite of its name
    )
    return {"quantization_config": config, "device_map": {"": device}}


def qlora_(model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str, seed: int) -> None:
    """Put LoRA on a model that was loaded with `loading_kwargs`; what is not quantized becomes fp32, as peft has it.

    Raises:
        ValueError: if the model was loaded without, or for a kind of adapter that does not merge into 4-bit weights.
    """
    if not getattr(model, "is_loaded_in_4bit", False):
        raise ValueError("--baseline qlora wants a model that was loaded in 4 bits: load it with `loading_kwargs`")
    if args.adapter_kind not in ("lora", "rslora"):
        raise ValueError(f"qlora goes with --adapter_kind lora or rslora, not {args.adapter_kind}")
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    add_lora_(model, targets, args, also_train=also_train)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # another layout for evaluation, of multiples of 32 alone
            module.support_avx512bf16_for_cpu = False
    model.is_quantized = False  # Trainer refuses quantized models without a wrapper of peft's around them


def dequantize_(model: nn.Module) -> None:
    """Turn the 4-bit weights of a model into fp32 ones, in place, the bases of its adapters included."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.set_submodule(name, plain_linear(weight, module.bias, torch.float32))
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_loaded_in_4bit = False
