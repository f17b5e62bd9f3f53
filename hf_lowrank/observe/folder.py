"""A run's output folder: can it be written, and does another run write there?"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from hf_lowrank.observe.records import LOCK_FILE


logger = logging.getLogger("hf_lowrank")

_held: dict[Path, TextIO] = {}
"""The locked files of this process. The system unlocks them when it ends, however it ends."""

_going_on = Counter[Path]()
"""How many trainings go on in a folder, one within the other."""


def hold(folder: Path) -> None:
    """Make a folder, and keep it for this process's runs, one after the other, until `let_go`.

    Raises:
        ValueError: if it cannot be made or written, or if a run of another process holds it.
    """
    path = folder.resolve() / LOCK_FILE
    if path in _held:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ValueError(f"the output folder cannot be written ({error}): name another --output_dir") from error
    if not _lock(file):
        file.seek(0)
        raise ValueError(
            f"{file.read() or 'another process'} is training in {folder}, and the files of two runs would mix there: "
            "name another --output_dir, or end that run first"
        )
    if not _is(path, file):  # its holder has deleted it between the two calls above
        file.close()
        return hold(folder)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    _held[path] = file


def let_go(folder: Path) -> None:
    """Let other processes have a folder; nothing happens if this one does not hold it, or a training goes on in it."""
    path = folder.resolve() / LOCK_FILE
    if path in _held and not _going_on[path]:
        with contextlib.suppress(OSError):  # the folder may be gone
            path.unlink()
        _held.pop(path).close()


@contextlib.contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """Keep a folder, if it is held, while a training goes on in it, whatever runs within that; then let it go."""
    path = folder.resolve() / LOCK_FILE
    _going_on[path] += 1
    try:
        yield
    finally:
        _going_on[path] -= 1
        let_go(folder)


def _lock(file: TextIO) -> bool:
    """Tell whether nobody else has locked a file; it is locked then, where its file system can."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:  # Windows, and some file systems over a network
        logger.warning("a second run in this output folder would go unnoticed: no file can be locked (%s)", error)
    return True


def _is(path: Path, file: TextIO) -> bool:
    """Tell whether a path leads to an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _forget() -> None:
    """Close the files that a fork has copied, which would stay locked for as long as the child lives."""
    for file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
