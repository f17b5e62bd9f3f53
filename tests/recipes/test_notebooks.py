"""The notebooks, executed as they are stored, with few steps and without a hub."""

import ast
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


FOLDER = Path(__file__).parents[2] / "recipes" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STEPS = {"glue": "80", "pretraining": "20"}
# What the notebook's own names must hold once all of it has run.
CHECK = """
assert losses["galore_i3s_adamw"][-1] < losses["galore_i3s_adamw"][0]
assert results["galore_i3s_adamw"][1] < 0.75 * results["adamw_torch"][1]  # the state: MiB
assert len(refreshes) > len(overlaps) > 3 and all(0 <= row.get("overlap", 0) <= 1.001 for row in refreshes)
"""


def test_both_are_found():
    assert [file.stem for file in NOTEBOOKS] == ["glue", "pretraining"]


@pytest.mark.processes
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_runs_from_top_to_bottom(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_LOWRANK_NOTEBOOK_STEPS", STEPS[file.stem])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(file, as_version=4)
    book.cells.append(nbformat.v4.new_code_cell(CHECK))
    NotebookClient(book, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2  # losses and overlaps
    assert any("galore_i3s_adamw  " in output.get("text", "") for output in outputs)  # the table


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_is_stored_without_outputs_and_installs_what_it_imports(file):
    book = nbformat.read(file, as_version=4)
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)

    def imported(cell):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module.split(".")[0]

    first, *others = cells
    assert set(imported(first)) <= sys.stdlib_module_names  # runs where nothing is installed
    wanted = {name for cell in others for name in imported(cell)} - sys.stdlib_module_names
    come_with_others = {"torch", "tokenizers", "huggingface_hub"}  # with hf_lowrank and transformers
    checked = next(node for node in ast.walk(ast.parse(first.source)) if isinstance(node, ast.List))
    assert wanted - come_with_others <= set(ast.literal_eval(checked))


def test_outside_of_a_clone_the_first_cell_says_so(tmp_path, monkeypatch):
    source = next(cell for cell in nbformat.read(NOTEBOOKS[0], as_version=4).cells if cell.cell_type == "code").source
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="does not lie in a clone"):
        exec(source.replace('"hf_lowrank",', '"hf_lowrank", "a_package_that_is_absent",'), {})
