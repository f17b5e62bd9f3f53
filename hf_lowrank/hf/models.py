"""Models by name, built on the meta device: their shapes without their numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn


LLAMA = {
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "35m": (384, 1024, 8, 6),
    "40m": (416, 1024, 8, 8),
    "60m": (512, 1376, 8, 8),
    "71m": (512, 1368, 8, 12),
    "100m": (640, 1708, 10, 12),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 16, 24),
    "350m": (1024, 2736, 16, 24),
    "1b": (2048, 5461, 32, 24),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
}
"""Hidden size, intermediate size, heads and layers of the LLaMA models of GaLore's pretraining (arXiv 2403.03507)."""

LLAMA_3 = {"8b": (4096, 14336, 32, 32), "70b": (8192, 28672, 64, 80), "405b": (16384, 53248, 128, 126)}
"""The same of LLaMA 3.1 (arXiv 2407.21783, table 3), with 8 heads for keys and values and a vocabulary of 128256."""

SIZES = (*LLAMA, *LLAMA_3)
VOCABULARY = 32000


def load_model(model: str | Path | nn.Module) -> nn.Module:
    """Return a model as it is, or build one on the meta device from a size of LLAMA, a config or a hub id.

    Raises:
        ValueError: if there is no such model.
    """
    if isinstance(model, nn.Module):
        return model
    try:
        import transformers
    except ImportError:
        raise ValueError("models by name need transformers: pip install transformers accelerate") from None
    size = re.sub(r"^llama[-_ ]?", "", str(model).lower())
    config: Any
    if size in SIZES:
        config = transformers.LlamaConfig(**llama_config(size))
    elif re.fullmatch(r"[\d.]+[mb]", size):  # do not ask the hub for it
        raise ValueError(f"there is no built-in size {str(model)!r}; valid: {', '.join(SIZES)}")
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(str(model))
        except Exception as error:  # those of huggingface_hub for a bad value are no ValueError
            if Path(model).exists():
                raise ValueError(f"the config {str(model)!r} cannot be read: {error}") from error
            raise ValueError(
                f"{str(model)!r} is neither a size ({', '.join(SIZES)}), a config file, a folder with one, nor a "
                f"model that the hub could be asked for ({type(error).__name__})"
            ) from error
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0] or "-", None)
    with torch.device("meta"):
        built: nn.Module = (
            transformers.AutoModelForCausalLM.from_config(config) if named is None else named._from_config(config)
        )
    return built


def llama_config(size: str) -> dict[str, Any]:
    """Return the arguments of transformers' LlamaConfig for a size of LLAMA or LLAMA_3, as in the authors' files.

    Raises:
        ValueError: for another size; the message lists them.
    """
    if size not in SIZES:
        raise ValueError(f"there is no built-in size {size!r}; valid: {', '.join(SIZES)}")
    hidden, intermediate, heads, layers = {**LLAMA, **LLAMA_3}[size]
    third = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": 32100 if size == "100m" else VOCABULARY,
        "max_position_embeddings": 2048 if size == "7b" else 1024,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **(third if size in LLAMA_3 else {}),
    }
