"""Breaks the package one line at a time and asks the test that must notice: `make test-all` runs all of mutants.py.

The package is copied; one line of the copy is changed; the named test runs with the copy in the place of the package
and must fail (not err in collection: a mutant that cannot be imported proves nothing). A text that does not occur
exactly once in its file is an error, and so is a named test that fails without a mutant.

    python tests/mutants/run.py [TEXT]      # only mutants whose file, kind or test contains TEXT
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import MUTANTS, Mutant


ROOT = Path(__file__).parents[2]
PACKAGE = "hf_lowrank"
PASSED, FAILED = 0, 1  # exit codes of pytest


def copied(folder: Path) -> Path:
    """Copy the package into a folder."""
    return Path(shutil.copytree(ROOT / PACKAGE, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__")))


def apply(mutant: Mutant, package: Path) -> None:
    """Change one place of a copy.

    Raises:
        LookupError: if the text is not there, or not once.
    """
    file = package / mutant.file
    text = file.read_text()
    if (found := text.count(mutant.old)) != 1:
        raise LookupError(f"{mutant.file} has {mutant.old!r} {found} times, not once: mend the entry in mutants.py")
    file.write_text(text.replace(mutant.old, mutant.new))


def pytest(folder: Path, *tests: str) -> tuple[int, str]:
    """Run tests with the copy in `folder` as the package; return the exit code and what was printed."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    done = subprocess.run(
        [*command, "--rootdir", str(ROOT), *(str(ROOT / test) for test in tests)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def verdict(mutant: Mutant) -> str:
    """Return what is wrong: nothing if the named test fails with the mutant."""
    with tempfile.TemporaryDirectory() as name:
        try:
            apply(mutant, copied(Path(name)))
        except LookupError as error:
            return str(error)
        code, printed = pytest(Path(name), mutant.killed_by)
    if code == FAILED:
        return ""
    return "survived" if code == PASSED else f"pytest ended with {code}:\n{printed[-1500:]}"


def healthy(tests: list[str]) -> str:
    """Return what is wrong with the named tests where nothing is mutated."""
    with tempfile.TemporaryDirectory() as name:
        copied(Path(name))
        where = [sys.executable, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"]
        place = subprocess.run(where, cwd=name, env={**os.environ, "PYTHONPATH": name}, capture_output=True, text=True)
        if not place.stdout.startswith(name):
            return f"the copy is not what is imported, but {place.stdout or place.stderr}"
        code, printed = pytest(Path(name), *tests)
    return "" if code == PASSED else f"without a mutant the named tests fail:\n{printed[-3000:]}"


def main() -> int:
    """Run the mutants; return 0 if all were killed."""
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [m for m in MUTANTS if only in m.file or only in m.kind or only in m.killed_by]
    wrong = healthy(sorted({mutant.killed_by for mutant in chosen}))
    if wrong:
        print(wrong)
        return 1
    alive = 0
    with ThreadPoolExecutor(2) as pool:
        for mutant, fault in zip(chosen, pool.map(verdict, chosen), strict=True):
            alive += bool(fault)
            print(f"{'ALIVE ' if fault else 'killed'} {mutant.kind}: {mutant.file} by {mutant.killed_by}", flush=True)
            if fault:
                print(f"       {fault}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} mutants killed")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main())
