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
        raise ValueError("models by name need transformers: pip install 'hf_lowrank[trainer]'") from None
    size = re.sub(r"^llama[-_ ]?", "", str(model).lower())
    config: Any
    if size in LLAMA:
        config = transformers.LlamaConfig(**llama_config(size))
    elif re.fullmatch(r"[\d.]+[mb]", size):  # do not ask the hub for it
        raise ValueError(f"there is no built-in size {str(model)!r}; valid: {', '.join(LLAMA)}")
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(str(model))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{str(model)!r} is neither a size ({', '.join(LLAMA)}), a config file, a folder with one, nor a "
                f"model that the hub could be asked for ({type(error).__name__})"
            ) from error
    named = getattr(transformers, (getattr(config, "architectures", None) or [""])[0] or "-", None)
    with torch.device("meta"):
        built: nn.Module = (
            transformers.AutoModelForCausalLM.from_config(config) if named is None else named._from_config(config)
        )
    return built


def llama_config(size: str) -> dict[str, Any]:
    """Return the arguments of transformers' LlamaConfig for a size of LLAMA, as in the authors' config files.

    Raises:
        ValueError: for another size; the message lists them.
    """
    if size not in LLAMA:
        raise ValueError(f"there is no built-in size {size!r}; valid: {', '.join(LLAMA)}")
    hidden, intermediate, heads, layers = LLAMA[size]
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": 32100 if size == "100m" else VOCABULARY,
        "max_position_embeddings": 2048 if size == "7b" else 1024,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }


def activation_bytes(net: nn.Module, *, batch: int, seq: int, itemsize: int, checkpointing: bool) -> int:
    """Estimate what a transformer keeps for its backward pass: a rule of thumb from the config's sizes.

    Per token a layer keeps 6h + 2k + ci numbers: both norms' inputs and outputs, the queries and the attention's
    output (h each), keys and values (k each), and c tensors of the feed-forward's width i: 4 where it is gated
    (SwiGLU), else 2. The attention matrix is not kept (fused kernels), nor are dropout masks. On top come the last
    norm's input and output and the logits, the latter once more in fp32 for the loss. With checkpointing only the
    input of every layer (h) and all of one layer are there at once.

    References:
        Korthikanti et al., Reducing activation recomputation in large transformer models, arXiv 2205.05198, section
        4.1: for k = h, c = 2, i = 4h and 2 bytes these are its 34 bytes per token and unit of width, less 2 for
        dropout.
    """
    config = getattr(net, "config", None)
    h, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if config is None or h is None or layers is None:
        return 0
    heads = getattr(config, "num_attention_heads", 1)
    head_width = getattr(config, "head_dim", None) or h // heads
    k = (getattr(config, "num_key_value_heads", None) or heads) * head_width
    i = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * h
    i *= getattr(config, "num_experts_per_tok", None) or 1
    gated = any("gate" in name.rpartition(".")[2] for name, _ in net.named_modules())
    layer = 6 * h + 2 * k + (4 if gated else 2) * i
    body = layers * h + layer if checkpointing else layers * layer
    logits = config.vocab_size * (itemsize + 4) if _has_lm_head(net) else 0
    return int(batch * seq * (itemsize * (body + 2 * h) + logits))


def _has_lm_head(net: nn.Module) -> bool:
    head = getattr(net, "get_output_embeddings", lambda: None)()
    return head is not None
