"""What used to be importable says where it is; what is pickled by its old place is still found there."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from hf_lowrank import _moved


@pytest.mark.parametrize("name", _moved.MOVED)
def test_an_old_path_says_where_its_content_is(name):
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(f"hf_lowrank.{name}")
    sentence = str(error.value)
    assert sentence.startswith(f"hf_lowrank.{name} is now hf_lowrank.")
    for new in sentence.partition(" is now ")[2].replace(",", " ").replace(" and ", " ").split():
        if new != "hf_lowrank.hf.axolotl":  # which needs axolotl
            importlib.import_module(new)


def test_importing_a_name_from_the_package_says_so_too():
    with pytest.raises(ModuleNotFoundError, match="hf_lowrank.rows is now hf_lowrank.methods.table"):
        from hf_lowrank import rows  # noqa: F401


def test_a_module_that_never_was_is_missing_as_any_other():
    with pytest.raises(ModuleNotFoundError, match="No module named 'hf_lowrank.rowz'"):
        importlib.import_module("hf_lowrank.rowz")


@pytest.mark.processes
@pytest.mark.parametrize("place", ["hf_lowrank.optimizer_names", "hf_lowrank.hf.names"])
def test_arguments_that_were_pickled_name_the_optimizer_in_a_fresh_process(place, tmp_path):
    """A pickle of the member as training_args.bin holds it, by the old place and by the new one."""
    text = f"c{place}\nrestore\n(S'galore_i3s_adamw'\ntR."  # protocol 0: a global, its argument, the call
    (tmp_path / "member.pkl").write_bytes(text.encode())
    code = f"import pickle; print(pickle.load(open({str(tmp_path / 'member.pkl')!r}, 'rb')).value)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "galore_i3s_adamw", result.stderr


@pytest.mark.processes
def test_training_arguments_survive_a_file_and_a_fresh_process(tmp_path):
    write = (
        "import torch, hf_lowrank; hf_lowrank.register(); from transformers import TrainingArguments; "
        f"a = TrainingArguments({str(tmp_path)!r}, optim='fira_i3s_adamw', report_to='none', use_cpu=True); "
        f"torch.save(a, {str(tmp_path / 'training_args.bin')!r})"
    )
    read = (
        "import torch; "
        f"a = torch.load({str(tmp_path / 'training_args.bin')!r}, weights_only=False); "
        "print(a.optim.value, type(a.optim))"
    )
    subprocess.run([sys.executable, "-c", write], check=True, capture_output=True)
    result = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True)
    assert result.stdout.split()[0] == "fira_i3s_adamw" and "OptimizerNames" in result.stdout, result.stderr
