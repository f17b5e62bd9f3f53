"""What a model keeps for its backward pass, from its config."""

from __future__ import annotations

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

    Where heads and the feed-forward's width are split over processes (`pieces`), so is all but 4h of a layer.

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
    layer = 4 * h + (2 * h + 2 * k + (4 if gated else 2) * i) // pieces
    body = layers * h + layer if checkpointing else layers * layer
    logits = config.vocab_size * (itemsize + 4) if _has_lm_head(net) else 0
    return int(batch * seq * (itemsize * (body + 2 * h) + logits))


def _has_lm_head(net: nn.Module) -> bool:
    head = getattr(net, "get_output_embeddings", lambda: None)()
    return head is not None
