"""The list of mutants fits the package and the tests; that each is killed is shown by mutants/run.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "mutants"))
from mutants import MUTANTS  # noqa: E402


@pytest.mark.parametrize("mutant", MUTANTS, ids=[f"{m.file}: {m.kind}" for m in MUTANTS])
def test_its_text_is_there_once_and_its_test_too(mutant):
    assert (ROOT / "hf_lowrank" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    file, test = mutant.killed_by.split("[")[0].split("::")
    assert f"def {test}(" in (ROOT / file).read_text()


def test_there_are_many_of_them_and_no_two_are_the_same():
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(MUTANTS) >= 25
