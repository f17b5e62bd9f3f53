"""A model without its weights: shapes and names on the meta device, from a hub id, a config or a built-in size."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from hf_lowrank.options import suggest


LLAMA_SIZES = {
    "llama-9m": (128, 352, 4, 4),
    "llama-20m": (256, 688, 4, 4),
    "llama-35m": (384, 1024, 6, 8),
    "llama-60m": (512, 1376, 8, 8),
    "llama-130m": (768, 2048, 12, 12),
    "llama-250m": (768, 2560, 24, 16),
    "llama-350m": (1024, 2736, 24, 16),
    "llama-1b": (2048, 5461, 24, 32),
    "llama-3b": (2560, 6848, 32, 32),
    "llama-7b": (4096, 11008, 32, 32),
}
"""Hidden size, intermediate size, layers, heads of the models that GaLore's experiments use; 32,000 tokens."""


def load_skeleton(model: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build a model on the meta device: no weight is read or allocated.

    Args:
        model: a hub id, a folder with a config.json, such a file itself, or a key of LLAMA_SIZES ("60m" will do).
        dtype: type of the weights.

    Raises:
        ValueError: if there is no such model; the message says what may be named.
    """
    config = load_config(model)
    with torch.device("meta"), _default_dtype(dtype):
        for name in config.architectures or ():
            cls = getattr(transformers, name, None)
            if cls is not None:
                return cls._from_config(config)  # type: ignore[no-any-return]
        try:
            return AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
        except ValueError:  # not a language model
            return AutoModel.from_config(config)  # type: ignore[no-any-return]


def load_config(model: str) -> PretrainedConfig:
    """Return the configuration that `load_skeleton` builds from; the same arguments and errors."""
    size = model.lower() if model.lower() in LLAMA_SIZES else f"llama-{model.lower()}"
    if size in LLAMA_SIZES:
        hidden, intermediate, layers, heads = LLAMA_SIZES[size]
        return LlamaConfig(
            vocab_size=32000,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            architectures=["LlamaForCausalLM"],
        )
    path = Path(model)
    if path.exists():
        file = path / "config.json" if path.is_dir() else path
        try:
            json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is not a model's config.json ({_first_line(error)})") from None
    elif os.sep in model.rstrip(os.sep) and model.count("/") != 1:
        raise ValueError(f"there is no file or folder {model}")
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"no model configuration for {model!r} ({_first_line(error)}); name a hub id, a folder with a config.json, "
            f"such a file, or a built-in size{suggest(model, LLAMA_SIZES)}"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype):  # type: ignore[no-untyped-def]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
