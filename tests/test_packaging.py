"""What is built is what a user installs: contents, console script, types, and nothing needed but torch."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest


pytestmark = [pytest.mark.full, pytest.mark.processes]
pytest.importorskip("build")
ROOT = Path(__file__).parent.parent


def call(*command, **kwargs):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # what is installed counts
    result = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=600, env=environment, **kwargs
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build wheel and sdist from a copy of the tree, as git would have it."""
    source = tmp_path_factory.mktemp("source") / "tree"
    copytree(
        ROOT, source, ignore=ignore_patterns(".venv*", ".git", "runs", "build", "dist", "*.egg-info", "__pycache__")
    )
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", source.parent / "dist", source)
    (wheel,), (sdist,) = ([*(source.parent / "dist").glob(pattern)] for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """Install the wheel alone into an environment that borrows the libraries of this one."""
    environment = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", environment)
    executable = environment / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", executable, "install", "--no-deps", "--no-index", built[0])
    site = next((environment / "lib").glob("python*/site-packages"))
    (site / "borrowed.pth").write_text("".join(path + "\n" for path in sys.path if path.endswith("site-packages")))
    return executable


def test_the_wheel_has_the_package_its_licence_and_nothing_else(built):
    names = zipfile.ZipFile(built[0]).namelist()
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_lowrank").rglob("*.py")} | {
        "hf_lowrank/py.typed"
    }
    assert ours <= set(names)
    other = [name for name in names if name not in ours and ".dist-info/" not in name]
    assert all(name.startswith("hf_lowrank/") for name in other)  # data files of the package
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("test" in name.split("/")[0] or name.startswith("recipes") for name in names)


def test_the_sdist_builds_the_same_package(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extractall(tmp_path, filter="data")
    (tree,) = tmp_path.iterdir()
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.cfg", "hf_lowrank"} <= {p.name for p in tree.iterdir()}
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", tree)
    (again,) = (tmp_path / "dist").glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(built[0]).namelist())


def test_the_console_script_runs(python, tmp_path):
    assert "galore_i3s_adamw" in call(python.parent / "hf-lowrank", "methods", cwd=tmp_path)


def test_the_optimizer_needs_torch_alone(python, tmp_path):
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "accelerate", "typer", "rich", "matplotlib", "safetensors", "peft",
                                  "bitsandbytes", "datasets", "huggingface_hub"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import torch, hf_lowrank
assert "site-packages" in hf_lowrank.__file__
model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 8))
optimizer = hf_lowrank.LowRankOptimizer(hf_lowrank.param_groups(model, rank=4), "fira_i3s_adamw", lr=1e-2)
before = model(torch.ones(1, 16)).square().mean()
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(1, 16)).square().mean().backward()
    optimizer.step()
assert model(torch.ones(1, 16)).square().mean() < before
"""
    call(python, "-c", script, cwd=tmp_path)


def test_the_command_line_says_which_extra_it_needs(python, tmp_path):
    script = "import sys; sys.modules['typer'] = None\nfrom hf_lowrank import cli\n"
    result = subprocess.run([python, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2 and "pip install typer (the extra 'cli' has all it needs)" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_users_file_passes_mypy_strict(python, tmp_path):
    pytest.importorskip("mypy")
    file = tmp_path / "user.py"
    file.write_text(
        "import torch\n"
        "from hf_lowrank import METHODS, LowRankOptimizer, param_groups\n\n\n"
        "def train(model: torch.nn.Module, steps: int) -> list[str]:\n"
        "    groups = param_groups(model, rank=4, weight_decay=0.1, update_proj_gap=10)\n"
        '    optimizer = LowRankOptimizer(groups, "galore_i3s_adamw", lr=1e-2, betas=(0.9, 0.95))\n'
        "    for _ in range(steps):\n"
        "        optimizer.step()\n"
        "        optimizer.zero_grad()\n"
        "    reveal_type(optimizer.declared_bytes())\n"
        "    return [name for name, method in METHODS.items() if method.paper]\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", python, file]
    assert 'Revealed type is "int"' in call(*command, cwd=tmp_path).replace("builtins.int", "int")
    file.write_text('from hf_lowrank import LowRankOptimizer\nLowRankOptimizer([], lr="fast")\n')
    wrong = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=tmp_path)
    assert wrong.returncode == 1 and 'incompatible type "str"' in wrong.stdout  # the types are seen
