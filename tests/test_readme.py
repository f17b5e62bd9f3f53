"""The README says what the code says, on one page."""

import re
from pathlib import Path

import hf_lowrank
from hf_lowrank.methods import resolve, tables


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIRST_SCREEN = "\n".join(README.splitlines()[:20])
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}


def test_it_is_one_page():
    assert len(README.splitlines()) <= 120


def test_the_first_screen_says_how_to_install_and_what_has_not_been_run():
    assert "pip install" in FIRST_SCREEN and "Not run: anything on a GPU" in FIRST_SCREEN


def test_the_examples_run_as_they_are_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    examples = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    for code in examples:
        exec(compile(code, "README.md", "exec", dont_inherit=True), namespace)
    assert len(examples) == 2 and isinstance(namespace["optimizer"], hf_lowrank.LowRankOptimizer)
    assert (tmp_path / "runs" / "first" / "hf_lowrank.json").exists()


def test_ten_names_with_the_state_that_their_parts_declare():
    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| ([^|]+) \|$", README, re.M))
    assert len(rows) == 10
    assert rows == {name: tables.state(resolve.Config.of(name, {})) for name in rows}


def test_states_in_the_choice_of_a_method_are_what_the_parts_declare():
    rows = re.findall(r"^\| [^|]*\| (.*`\w+`.*) \| [^|]*\| ([^|]+) \|$", PAGES["choosing.md"], re.M)
    said = {name: state for names, state in rows for name in re.findall(r"`(\w+)`", names)}
    stated = {name: state for name, state in said.items() if "nr" in state}  # others are said in words
    assert len(stated) > 8
    for name, state in stated.items():
        assert state.startswith(tables.state(resolve.Config.of(name, {}))), (name, state)


def test_every_file_that_is_linked_or_named_exists():
    linked = re.findall(r"\]\((?!http)([\w./-]+)(?:#[\w-]+)?\)", README)
    assert "docs/pictures/loss_and_state.png" in linked and len(linked) > 20
    assert [path for path in linked if not (ROOT / path).exists()] == []
    for name, page in PAGES.items():
        named = re.findall(r"`((?:tests|recipes)/[\w./-]+)`", page)
        assert [path for path in named if not (ROOT / path).exists()] == [], name


def test_nothing_is_fetched_from_an_index_that_does_not_have_it():
    for name, page in PAGES.items():
        assert not re.search(r"pip install (?:-U )?['\"]?hf[_-]lowrank", page), name
        assert "pypi.org/project/hf" not in page, name


def test_what_a_public_project_has():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"check", "test", "test-lowest"} <= set(re.findall(r"run: make ([\w-]+)", workflow)) <= targets
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {hf_lowrank.__version__}\n" in citation and "license: Apache-2.0" in citation
    templates = {path.name: path.read_text() for path in (ROOT / ".github" / "ISSUE_TEMPLATE").iterdir()}
    assert "hf-lowrank env RUN" in templates["bug.yml"] and "hf-lowrank env RUN" in templates["result.yml"]


def test_no_placeholder_is_left():
    for name, page in PAGES.items():
        assert not re.search(r"@\w+@|TODO|FIXME", page), name
