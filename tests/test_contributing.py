"""The worked examples of CONTRIBUTING.md: one part of each kind, held against their references as any part is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from comparing import agree
from references import REFERENCES
from streams import SQUARE, STACK, TALL, WIDE

from hf_lowrank import METHODS
from hf_lowrank.methods import registry


ROOT = Path(__file__).parents[1]
NAMES = ("galore_largest_rows_adamw", "galore_row_norms", "leaky_adamw")


@pytest.fixture(scope="module", autouse=True)
def examples():
    """Run the blocks as the document has them, and take back what they registered."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    tables = (METHODS, *map(registry.classes, registry.KINDS), REFERENCES)
    before = [dict(table) for table in tables]
    namespace = {"__name__": __name__}
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), namespace)
    REFERENCES.update(namespace["REFERENCES"])
    yield blocks
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


def test_there_is_an_example_of_each_kind_and_their_references(examples):
    assert len(examples) == 4


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE, STACK], ids=["wide", "tall", "square", "stack"])
@pytest.mark.parametrize("name", NAMES)
def test_an_example_equals_its_reference(name, shape):
    agree(name, shape, on_refresh="rotate" if name == "galore_row_norms" else "keep")


def test_an_option_of_an_example_counts():
    agree("leaky_adamw", WIDE, leak=0.7)
    with pytest.raises(AssertionError):
        agree("leaky_adamw", WIDE, leak=0.7, each=lambda t, group, refs: [setattr(ref, "leak", 0.1) for ref in refs])
