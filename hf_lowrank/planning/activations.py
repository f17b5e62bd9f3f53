"""What a model keeps for its backward pass, from its config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def activation_bytes(
    net: nn.Module, *, batch: int, seq: int, itemsize: int, checkpointing: bool, pieces: int = 1
) -> int:
    """Estimate what a transformer keeps for its backward pass: a rule of thumb from the config's sizes.

    Per token a layer keeps 6h + 2k + ci numbers: both norms' inputs and outputs, the queries and the attention's
    output (h each), keys and values (k each), and c tensors of the feed-forward's width i: 4 where it is gated
    (SwiGLU), else 2. The attention matrix is not kept (fused kernels), nor are dropout masks. On top come the last
    norm's input and output and the logits, the latter once more in fp32 for the loss. With checkpointing only the
    input of every layer (h) and all of one layer are there at once.

    Where heads and the feed-forward's width are split over processes (`pieces`), so is all but 4h of a layer. A model
    with several parts is counted by its language model, one with an encoder and a decoder by the layers of both.

    Returns:
        The bytes; 0 where the config does not say the sizes.

    References:
        Korthikanti et al., Reducing activation recomputation in large transformer models, arXiv 2205.05198, section
        4.1: for k = h, c = 2, i = 4h and 2 bytes these are its 34 bytes per token and unit of width, less 2 for
        dropout.
    """
    config = _of_the_text(getattr(net, "config", None))
    h, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if config is None or h is None or layers is None:
        return 0
    heads = getattr(config, "num_attention_heads", 1)
    head_width = getattr(config, "head_dim", None) or h // heads
    k = (getattr(config, "num_key_value_heads", None) or heads) * head_width
    if getattr(config, "is_encoder_decoder", False):
        layers += getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", 0)
    width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * h
    i = max(width) if isinstance(width, Sequence) else width  # of every layer, where they differ
    if experts := getattr(config, "num_experts_per_tok", None):
        i = experts * (getattr(config, "moe_intermediate_size", None) or i)
    names = [name for named in (net.named_modules(), net.named_parameters()) for name, _ in named]
    gated = any("gate" in name.rpartition(".")[2] for name in names)
    layer = 4 * h + (2 * h + 2 * k + (4 if gated else 2) * i) // pieces
    body = layers * h + layer if checkpointing else layers * layer
    logits = config.vocab_size * (itemsize + 4) if _has_lm_head(net) else 0
    return int(batch * seq * (itemsize * (body + 2 * h) + logits))


def _of_the_text(config: Any) -> Any:
    """Return the config of the part that reads text, where a model has others."""
    several = config is not None and hasattr(config, "get_text_config")
    several = several and not getattr(config, "is_encoder_decoder", False)
    return config.get_text_config() if several else config


def _has_lm_head(net: nn.Module) -> bool:
    head = getattr(net, "get_output_embeddings", lambda: None)()
    return head is not None
