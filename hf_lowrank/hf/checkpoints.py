"""Which checkpoints can be resumed, and what is said of the others."""

from __future__ import annotations

import functools
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, trainer, trainer_utils

from hf_lowrank.hf.arguments import name_of
from hf_lowrank.methods import resolve
from hf_lowrank.observe.records import RUN_FILE


logger = logging.getLogger("hf_lowrank")


def skipping_incomplete(original: Callable[[str], str | None]) -> Callable[[str], str | None]:
    """Wrap `get_last_checkpoint`: a run of ours resumes from the last checkpoint that is whole."""

    @functools.wraps(original)
    def get_last_checkpoint(folder: str) -> str | None:
        last = original(folder)
        if last is None or not (Path(folder) / RUN_FILE).exists():  # not a run of ours
            return last
        pattern = trainer_utils._re_checkpoint
        found = [path for path in Path(folder).iterdir() if path.is_dir() and pattern.search(path.name)]
        for path in sorted(found, key=lambda path: int(pattern.search(path.name).groups()[0]), reverse=True):
            if fault := checkpoint_fault(path):
                logger.warning("skipping %s: %s", path, fault)
            else:
                return str(path)
        return None

    return get_last_checkpoint


def naming_what_is_wrong(original: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors of an optimizer file that cannot be read into sentences; loading itself stays as it is."""

    @functools.wraps(original)
    def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
        if checkpoint is None or name_of(self.args) not in resolve.names():
            return original(self, checkpoint)
        if fault := checkpoint_fault(Path(checkpoint)):
            raise ValueError(f"cannot resume from {checkpoint}: {fault}. Name an earlier checkpoint.")
        try:
            return original(self, checkpoint)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(
                f"cannot resume from {checkpoint}: its optimizer state holds more than tensors and numbers"
                f"{f' ({found[1]})' if found else ''}, which is not loaded, because unpickling it may run code. "
                "hf_lowrank writes no such files; transformers' galore_adamw and apollo_adamw do"
            ) from error

    return _load_optimizer_and_scheduler


def checkpoint_fault(path: Path) -> str | None:
    """Say what keeps a checkpoint folder from being resumed, or None: its trainer state and optimizer are readable."""
    try:
        json.loads((path / trainer.TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError) as error:
        return f"{trainer.TRAINER_STATE_NAME} is missing or unreadable ({type(error).__name__})"
    files = path / trainer.OPTIMIZER_NAME, path / trainer.OPTIMIZER_NAME_BIN  # the second is FSDP's full state dict
    sharded = any((folder / ".metadata").exists() for folder in path.glob("optimizer_*"))  # FSDP's own format
    if not sharded and not any(file.exists() and zipfile.is_zipfile(file) for file in files):
        return f"{trainer.OPTIMIZER_NAME} is missing or unreadable"
    return next((fault for file in files if file.exists() and (fault := archive_fault(file))), None)


def archive_fault(file: Path) -> str | None:
    """Say which record of an archive that torch.save wrote does not match its checksum (CRC32), or None."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        return f"{file.name} is damaged ({error})"
    return f"{file.name} is damaged: the checksum of its record {damaged} is wrong" if damaged else None
