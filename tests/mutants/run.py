"""Breaks the package one line at a time and asks the test that must notice: `make test-all` runs all of mutants.py.

The package is copied; one line of the copy is changed; the named test runs with the copy in the place of the package
and must fail (not err in collection: a mutant that cannot be imported proves nothing). A text that does not occur
exactly once in its file is an error, and so is a named test that fails without a mutant. Every run is a fork of one
process that has imported torch, and not the package.

    python tests/mutants/run.py [TEXT]      # only mutants whose file, kind or test contains TEXT
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.pool import Pool
from pathlib import Path


os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # else importing torch imports the package that is installed
os.environ["OMP_NUM_THREADS"] = "1"
sys.dont_write_bytecode = True

import pytest  # noqa: E402
import torch  # noqa: E402, F401
from mutants import MUTANTS, Mutant  # noqa: E402


ROOT = Path(__file__).parents[2]
PACKAGE = "hf_lowrank"
PASSED, FAILED = 0, 1  # exit codes of pytest


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


def run(tests: Sequence[str], mutant: Mutant | None = None) -> tuple[int, str]:
    """Run tests with a copy as the package, in a process of their own; return pytest's code and what was printed."""
    assert PACKAGE not in sys.modules
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()) as printed:
        package = Path(shutil.copytree(ROOT / PACKAGE, Path(name) / PACKAGE))
        if mutant is not None:
            apply(mutant, package)
        os.chdir(name)
        sys.path.insert(0, name)
        options = ["-q", "-x", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        code = pytest.main([*options, *(str(ROOT / test) for test in tests)])
        os.chdir(ROOT)
        assert sys.modules[PACKAGE].__file__.startswith(name), "the copy is not what was imported"
    return int(code), printed.getvalue()


def healthy(tests: Sequence[str]) -> str:
    """Return what is wrong with tests where nothing is mutated."""
    code, printed = run(tests)
    return "" if code == PASSED else f"without a mutant a named test fails:\n{printed[-3000:]}"


def verdict(mutant: Mutant) -> str:
    """Return what is wrong: nothing if the named test fails with the mutant."""
    try:
        code, printed = run([mutant.killed_by], mutant)
    except LookupError as error:
        return str(error)
    if code == FAILED:
        return ""
    return "survived" if code == PASSED else f"pytest ended with {code}:\n{printed[-1500:]}"


class Fork(multiprocessing.get_context("fork").Process):  # type: ignore[name-defined, misc]
    """A process of the pool that may start others: some of the named tests do."""

    daemon = property(lambda self: False, lambda self, value: None)


class Forks(type(multiprocessing.get_context("fork"))):  # type: ignore[misc]
    """What a pool makes its processes with."""

    Process = Fork


def main() -> int:
    """Run the mutants; return 0 if all were killed."""
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [m for m in MUTANTS if only in m.file or only in m.kind or only in m.killed_by]
    tests, alive = sorted({mutant.killed_by for mutant in chosen}), 0
    with Pool(2, maxtasksperchild=1, context=Forks()) as pool:
        wrong = [
            fault for fault in pool.imap(healthy, [some for some in (tests[::2], tests[1::2]) if some], 1) if fault
        ]
        for mutant, fault in zip(chosen, pool.imap(verdict, chosen, 1), strict=True):
            alive += bool(fault)
            print(f"{'ALIVE ' if fault else 'killed'} {mutant.kind}: {mutant.file} by {mutant.killed_by}", flush=True)
            if fault:
                print(f"       {fault}", flush=True)
    print(*wrong, f"{len(chosen) - alive} of {len(chosen)} mutants killed", sep="\n")
    return int(alive > 0 or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
