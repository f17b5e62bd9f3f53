"""The LLaMA models of the low-rank papers, from 9 M to 7 B parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from hf_lowrank.hf.models import LLAMA, llama_config
from recipes.c4_pretraining.data import model_vocab_size
from recipes.shared.common import require_at_least, stop


@dataclass
class ModelArguments:
    """Size and precision of the model, and the second learning rate."""

    model_size: str = field(default="60m", metadata={"help": f"One of {', '.join(LLAMA)}."})
    hidden_size: int | None = field(default=None, metadata={"help": "Another width than the size's."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Another feed-forward width."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Another number of heads."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Another number of layers."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32",
        metadata={
            "help": "Of the weights. bfloat16: no fp32 copy; the low-rank optimizers and AdamW keep fp32 moments and "
            "round stochastically. (Trainer's --bf16 computes in bf16 with fp32 weights.)"
        },
    )
    matrix_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Matrices of the body (or the adapters in their place) train at this rate, all else at "
            "learning_rate; for any optimizer. Default: learning_rate, times the option `scale` of a low-rank one."
        },
    )


def shape(args: ModelArguments) -> tuple[int, int, int, int]:
    """Return width, feed-forward width, heads and layers, or end with what is wrong with them."""
    if args.model_size not in LLAMA:
        near = get_close_matches(args.model_size, LLAMA, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        stop(f"--model_size {args.model_size} is none of {', '.join(LLAMA)}{hint}")
    width, inner, heads, layers = LLAMA[args.model_size]
    width, inner = args.hidden_size or width, args.intermediate_size or inner
    heads, layers = args.num_attention_heads or heads, args.num_hidden_layers or layers
    require_at_least(
        1, hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_hidden_layers=layers
    )
    if width % heads or width // heads % 2:
        stop(f"--hidden_size {width} must be an even multiple of --num_attention_heads {heads}")
    return width, inner, heads, layers


def config(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> LlamaConfig:
    """Return the configuration that the arguments name."""
    width, inner, heads, layers = shape(args)
    published = llama_config(args.model_size)
    ours = {
        "vocab_size": model_vocab_size(tokenizer),
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": max(block_size, published["max_position_embeddings"]),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "use_cache": False,
    }
    return LlamaConfig(**published | ours)


def build(args: ModelArguments, llama: LlamaConfig) -> LlamaForCausalLM:
    """Return a model with random weights, drawn in fp32 by torch's global generator; only weights change precision."""
    model = LlamaForCausalLM(llama)
    for p in model.parameters():
        p.data = p.data.to(getattr(torch, args.dtype))
    return model
