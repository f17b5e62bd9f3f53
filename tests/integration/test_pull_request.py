"""The pull request to transformers: its diff applies to the one that is installed, and its test passes there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "transformers-pull-request.md").read_text()
(WRITTEN_FOR,) = re.findall(r"written\s+for transformers (\d+\.\d+)", PAGE)
(DIFF,) = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.M | re.S)
(TEST,) = re.findall(r"^``` \{\.python \.no-run\}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.mark.processes
@pytest.mark.skipif(
    not transformers.__version__.startswith(f"{WRITTEN_FOR}."), reason=f"it is for transformers {WRITTEN_FOR}"
)
def test_it_applies_and_its_test_passes(tmp_path):
    installed, changed = Path(transformers.__file__).parent, tmp_path / "src" / "transformers"
    changed.mkdir(parents=True)
    for path in installed.iterdir():  # links, but for the files that the diff may touch
        if path.name == "utils":
            shutil.copytree(path, changed / "utils", ignore=shutil.ignore_patterns("__pycache__"))
        elif path.suffix == ".py":
            shutil.copy(path, changed)
        elif path.name != "__pycache__":
            (changed / path.name).symlink_to(path)
    (tmp_path / "pr.diff").write_text(DIFF)
    applied = subprocess.run(["git", "apply", "--verbose", "pr.diff"], cwd=tmp_path, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    (tmp_path / "test_trainer_hf_lowrank.py").write_text(TEST)
    path = os.pathsep.join([str(tmp_path / "src"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_trainer_hf_lowrank.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
