"""The documentation says what is true: its blocks run, its site builds without a warning.

Python blocks of one page share a namespace, and a folder with its shell blocks. A block with a title is a file. One
that is marked `.no-run` needs a GPU, a hub or an installation. Every line of a block marked `.output` begins a line
that the block above it has printed; three dots stand for anything.
"""

import contextlib
import importlib.util
import io
import logging
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest

import hf_lowrank
from hf_lowrank import METHODS, Moments, Reconstruction, Subspace
from hf_lowrank.methods import papers, resolve, tables
from hf_lowrank.methods.common import LowRankOptions, SharedOptions
from hf_lowrank.methods.dense import SplitOptions


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```[ ]*(?P<info>[^`\n]*)\n(?P<code>.*?)^```$", re.M | re.S)
KNOWN = {"python", "sh", "text", "yaml", "diff"}


def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = hooks()
WRITTEN = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
GENERATED = HOOKS.pages()


def blocks(page):
    """Yield (language, marks, title, code) of every fenced block."""
    for match in BLOCK.finditer(page):
        info = match["info"]
        language, *marks = re.findall(r"(?:^|\.)([\w-]+)", info.split("title=")[0])
        title = re.search(r'title="([^"]+)"', info)
        yield language, set(marks), title and title[1], match["code"]


def spaced(text):
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


@pytest.fixture
def table():
    """Forget what a page adds to the tables of methods and parts."""
    rows, parts = dict(METHODS), Subspace.registry
    kept = dict(parts)
    yield
    for registry, before in ((METHODS, rows), (parts, kept)):
        registry.clear()
        registry.update(before)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Put this Python first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)


def run_shell(code):
    """Run a block; our own command without a process of its own, which would import torch once more."""
    if code.startswith("hf-lowrank "):
        from hf_lowrank import cli

        printed = io.StringIO()
        argv = mock.patch.object(sys, "argv", shlex.split(code))
        with argv, contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return printed.getvalue()
    done = subprocess.run(["bash", "-ec", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_python(code, namespace, name):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec", dont_inherit=True), namespace)
    return printed.getvalue()


def run(page, name):
    namespace, printed = {"__name__": "__main__"}, ""
    for language, marks, title, code in blocks(page):
        if title:
            Path(title).write_text(code)
        elif "output" in marks:
            lines = spaced(printed)
            patterns = {line: re.escape(line).replace(r"\.\.\.", ".*") for line in spaced(code)}
            missing = [line for line, pattern in patterns.items() if not any(re.match(pattern, x) for x in lines)]
            assert not missing, f"{name}: not printed: {missing}; printed: {lines}"
        elif "no-run" not in marks and language in ("python", "sh"):
            printed = run_shell(code) if language == "sh" else run_python(code, namespace, name)


@pytest.mark.processes
@pytest.mark.parametrize("name", WRITTEN)
def test_the_blocks_of_a_page_run(name, commands, table):
    if name.startswith("with/"):
        pytest.importorskip(Path(name).stem)
    logging.getLogger("hf_lowrank").setLevel(logging.WARNING)
    try:
        run(WRITTEN[name], name)
    finally:
        logging.getLogger("hf_lowrank").setLevel(logging.INFO)
        hf_lowrank.register()


def test_the_blocks_of_the_method_pages_run():
    for name, page in GENERATED.items():
        run(page, name)


def test_every_method_has_a_page_with_its_parts_and_options():
    assert set(GENERATED) == {
        "references.md",
        "methods/index.md",
        "methods/options.md",
        *(f"methods/{name}.md" for name in METHODS),
    }
    for name, row in METHODS.items():
        page = GENERATED[f"methods/{name}.md"]
        for option in resolve.complete(name, {}):
            assert f"| `{option}` |" in page, (name, option)
        for kind in hf_lowrank.methods.registry.KINDS:
            assert f"## {kind.capitalize()}: {getattr(row, kind)}" in page
        assert page.count("**References:**") == page.count("**Differs from the authors' code:**") == 3, name
        assert f"`{tables.state(resolve.Config.of(name, {}))}`" in page


def test_the_page_of_methods_has_the_generated_table_with_links():
    page = GENERATED["methods/index.md"].splitlines()
    for line in tables.table().splitlines()[2:]:
        name = re.match(r"\| `(\w+)`", line)[1]
        assert line.replace(f"`{name}`", f"[`{name}`]({name}.md)", 1) in page


def test_the_page_of_options_has_every_option_below_the_part_that_has_it():
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", GENERATED["methods/options.md"], re.M | re.S))
    for kind, base in (("subspace", Subspace), ("moments", Moments), ("reconstruction", Reconstruction)):
        for name in {getattr(row, kind) for row in METHODS.values()}:
            for item in fields(base.registry[name]):
                (section,) = (
                    title
                    for title, text in sections.items()
                    if f"| `{item.name}` |" in text and re.search(rf"\b{kind}s?\b.*\b{name}\b", title, re.I)
                )
                assert section, (kind, name, item.name)
    common = {
        tables.SHARED: SharedOptions,
        tables.MATRICES: LowRankOptions,
        tables.SPLIT: SplitOptions,
    }
    for title, owner in common.items():
        assert re.findall(r"^\| `(\w+)`", sections[title], re.M) == [item.name for item in fields(owner)]


def test_a_default_that_differs_is_said_with_the_methods_that_have_it():
    page = GENERATED["methods/options.md"]
    assert "| `update_proj_gap` | 200; 1 for `ldadam`; 1000 for `flora_adafactor` | an integer >= 1 |" in page
    assert "| `scaling` | channel; tensor for `apollo_mini_adamw` | one of channel, tensor |" in page


def test_every_paper_of_a_method_is_among_the_references_with_its_title():
    rows = dict(
        re.findall(r"^\| \[(\d{4}\.\d{5}|\d{4}\.\d{4})\]\(\S+\) \| (.*) \|$", GENERATED["references.md"], re.M)
    )
    for name, row in METHODS.items():
        for number in papers.numbers(row.paper):
            assert f"[`{name}`](methods/{name}.md)" in rows[number] and papers.title(number) in rows[number]
    assert set(rows) >= set(papers.TITLES)


def test_every_block_says_what_it_is():
    for name, page in {**WRITTEN, **GENERATED}.items():
        assert page.count("\n```") == 2 * len(list(blocks(page))), f"{name}: a fence is left open"
        for language, marks, _, _ in blocks(page):
            assert language in KNOWN and marks <= {"no-run", "output", "equation", "columns"}, (name, language, marks)


def test_names_of_methods_in_the_pages_exist():
    names = resolve.names()
    for name, page in WRITTEN.items():
        ours = r"`((?:galore_(?:dominant|i3s|hybrid|random|uniform)|fira|apollo_(?:random|dominant|mini))_\w+)`"
        assert not set(re.findall(ours, page)) - set(names), name


def test_the_axolotl_plugin_registers(monkeypatch):
    if importlib.util.find_spec("axolotl") is None:  # the interface that it needs is one class
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, type(sys)(name))
        sys.modules["axolotl.integrations.base"].BasePlugin = object
    from transformers.training_args import OptimizerNames

    from hf_lowrank.hf.axolotl import LowRankPlugin

    hf_lowrank.unregister()
    assert "galore_i3s_adamw" not in set(OptimizerNames)
    LowRankPlugin().register({})
    assert OptimizerNames("galore_i3s_adamw") == "galore_i3s_adamw"


@pytest.mark.processes
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},  # an advertisement of its theme
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    for name in METHODS:
        assert (tmp_path / "site" / "methods" / name / "index.html").exists()
