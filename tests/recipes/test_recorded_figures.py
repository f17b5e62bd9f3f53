"""What the pages say of the study of methods is what the recorded runs say."""

import re
from pathlib import Path

import pytest

from recipes.studies.compare_methods import FILE, Record
from recipes.studies.compare_rows import BASELINE, ROWS
from recipes.studies.compare_tables import interval, paired, results, text


ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/choosing.md", "docs/recommended.md")}
STUDIES = (ROOT / "recipes" / "studies" / "README.md").read_text()
LARGER = "### A model four times as large"


def recorded(size, steps):
    return {result.row.name: result for result in results(Record(FILE), [*ROWS.values()], size, steps)}


@pytest.fixture(scope="module")
def found():
    return recorded("small", 1000)


@pytest.fixture(scope="module")
def larger():
    return recorded("large", 1200)


def minus(found, first, second):
    return text(paired(found[first].losses, found[second].losses), sign="+")


def check_behind(found, first, second, page):
    """By how much the first is behind the second, and that the interval does not hold zero."""
    middle, half = paired(found[first].losses, found[second].losses)
    assert middle - half > 0
    assert minus(found, first, second).removeprefix("+") in page


def test_the_table_of_the_evidence(found):
    evidence = PAGES["docs/recommended.md"].partition("## The evidence")[2].partition(LARGER)[0]
    assert check_lines(evidence, found) == 18


def test_the_table_of_the_larger_model(larger):
    assert check_lines(PAGES["docs/recommended.md"].partition(LARGER)[2], larger) == 6


def check_lines(text_of_table, found):
    """Every line: bytes, loss and the difference to AdamW. Returns how many there are."""
    lines = re.findall(
        r"^\| `(\w+)`(, `state_format=4bit`)? \| ([\d.]+) \| ([\d. ±]+)[^|]*\| ([^|]+) \|", text_of_table, re.M
    )
    for name, four_bits, size, loss, difference in lines:
        row = f"{name}_4bit" if four_bits else name
        assert size == f"{found[row].middle('matrix_bytes'):.2f}", row
        assert loss.strip() == text(interval([*found[row].losses.values()])), row
        assert difference == ("-" if row == BASELINE else minus(found, row, BASELINE)), row
    return len(lines)


def test_the_table_of_the_searches(found):
    lines = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+ ± [\d.]+) \| ([^|]+) \| (\d+) \| (\d+)", STUDIES, re.M)
    assert [name for name, *_ in lines] == list(found)
    for name, size, loss, difference, seeds, trials in lines:
        row = found[name]
        assert size == f"{row.middle('matrix_bytes'):.2f}" and loss == text(interval([*row.losses.values()])), name
        assert difference == ("-" if name == BASELINE else minus(found, name, BASELINE)), name
        assert (int(seeds), int(trials)) == (len(row.losses), row.trials), name


VERDICTS = {"holds here": (1, 1), "not decidable here": (-1, 1), "the other way round here": (-1, -1)}


def test_what_papers_say_is_judged_by_the_intervals(found):
    lines = re.findall(r"^\| [^|]+ \| `(\w+)`, `(\w+)` \| ([^|]+) \| ([^|]+) \|", STUDIES, re.M)
    assert len(lines) == 16
    for first, second, difference, verdict in lines:
        assert difference == minus(found, first, second), (first, second)
        middle, half = paired(found[first].losses, found[second].losses)
        signs = tuple(1 if end < 0 else -1 for end in (middle + half, middle - half))
        assert signs == VERDICTS[verdict], (first, second)


@pytest.mark.parametrize("page", ["README.md", "docs/choosing.md"])
def test_the_tables_by_bytes(found, page):
    lines = re.findall(r"^\| (\d[\d.]*) \| [^`|]*`(\w+)`([^|]*)\| ([^|]+) \|", PAGES[page], re.M)
    assert len(lines) >= 4
    for size, name, more, difference in lines:
        row = f"{name}_4bit" if "`state_format=4bit`" in more else name
        assert float(size) == pytest.approx(found[row].middle("matrix_bytes"), abs=5.1e-3), row
        assert difference == ("0" if row == BASELINE else minus(found, row, BASELINE)), row


@pytest.mark.parametrize(
    "first, second",
    [
        ("frugal_adamw", "muon_4bit"),
        ("frugal_adamw_4bit", "muon_4bit"),
        ("subtrack_pp_adamw", "muon_4bit"),
        ("fira_adamw", "muon_4bit"),
        ("galore_i3s_adamw", "muon_4bit"),
        ("galore_dominant_adamw", "muon_4bit"),
        ("alice_adamw", "muon_4bit"),
        ("ldadam", "muon_4bit"),
        ("apollo_random_adamw", "muon_4bit"),
        ("apollo_mini_adamw", "muon_4bit"),
        ("i3s_compensation", "frugal_adamw"),
        ("alice_adamw", "frugal_adamw"),
        ("ldadam", "frugal_adamw"),
        ("foam_adamw", "frugal_adamw"),
        ("fira_i3s_adamw", "frugal_adamw"),
        ("apollo_random_adamw", "frugal_adamw"),
        ("subtrack_pp_adamw", "frugal_adamw"),
        ("fira_adamw", "frugal_adamw"),
        ("galore_i3s_adamw", "frugal_adamw"),
        ("galore_dominant_adamw", "frugal_adamw"),
        ("galore_i3s_adamw", "full_adamw"),
        ("galore_dominant_adamw", "full_adamw"),
        ("golore_adamw", "full_adamw"),
        ("full_adamw", "ldadam"),
        ("galore_i3s_adamw", "i3s_compensation"),
        ("galore_dominant_adamw", "fira_adamw"),
        ("apollo_mini_adamw", "racs"),
    ],
)
def test_differences_in_the_text(found, first, second):
    check_behind(found, first, second, PAGES["docs/recommended.md"])


@pytest.mark.parametrize(
    "first, second",
    [
        ("frugal_adamw", "muon_4bit"),
        ("subtrack_pp_adamw", "muon_4bit"),
        ("fira_adamw", "muon_4bit"),
        ("subtrack_pp_adamw", "frugal_adamw"),
        ("fira_adamw", "frugal_adamw"),
        ("full_adamw", "frugal_adamw"),
    ],
)
def test_differences_in_the_text_of_the_larger_model(larger, first, second):
    check_behind(larger, first, second, PAGES["docs/recommended.md"].partition(LARGER)[2])


@pytest.mark.parametrize("page", PAGES)
def test_how_far_racs_is_behind_at_the_larger_size(larger, page):
    assert minus(larger, "racs", BASELINE).removeprefix("+") in PAGES[page]


@pytest.mark.parametrize("row", ["galore_dominant_adamw", "galore_i3s_adamw"])
def test_who_is_behind_adamw_on_the_first_pages(found, row):
    assert minus(found, row, BASELINE).removeprefix("+") in PAGES["README.md"]
