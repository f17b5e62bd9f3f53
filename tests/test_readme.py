"""The README says what the code says."""

import re
from pathlib import Path

from hf_lowrank.methods import tables


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_methods_is_the_generated_one():
    assert tables.table() in README


def test_the_table_of_options_is_the_generated_one():
    assert tables.options_table() in README


def test_every_file_that_is_linked_or_named_exists():
    linked = re.findall(r"\]\((?!http)([\w./-]+)\)", README)
    named = re.findall(r"`((?:tests|recipes)/[\w./-]+)`", README)
    assert linked and named
    assert all((ROOT / path).exists() for path in linked + named)


def test_no_placeholder_is_left():
    assert not re.search(r"@\w+@", README)
