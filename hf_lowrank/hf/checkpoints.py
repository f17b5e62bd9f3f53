"""Which checkpoints can be resumed, and what is said of the others."""

from __future__ import annotations

import functools
import io
import json
import logging
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments, trainer, trainer_utils
from typing_extensions import override

from hf_lowrank.hf.arguments import name_of, unwrapped
from hf_lowrank.hf.layer_sampling import refuse_dropped
from hf_lowrank.methods import resolve
from hf_lowrank.observe.records import RUN_FILE
from hf_lowrank.optimizer import LowRankOptimizer


logger = logging.getLogger("hf_lowrank")

SUMS_FILE = "hf_lowrank_sums.json"
"""In a checkpoint of a sharded run: checksums (CRC32) of the files that have none of their own, by path."""

SHARDED = "*/.metadata"
"""Where a checkpoint has folders of torch.distributed.checkpoint: of the optimizer, and of the weights."""

SAVED = "hf_lowrank"
"""Key of what the callback keeps in trainer_state.json."""

GENERATORS = "generators"
"""Key in that of how many processes write an rng_state into the folder."""

ARCHIVES = ("optimizer*.pt", "optimizer*.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth")
"""What torch.save writes into a checkpoint beside the weights; each record in it has a checksum."""


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
            if fault := checkpoint_fault(path) or lacks_generators(path):
                logger.warning("skipping %s: %s", path, fault)
            else:
                return str(path)
        return None

    return get_last_checkpoint


def naming_what_is_wrong(original: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors of an optimizer file that cannot be read into sentences; loading itself stays as it is."""

    @functools.wraps(original)
    def _load_optimizer_and_scheduler(self: Trainer, checkpoint: str | None) -> None:
        if checkpoint is None:
            return original(self, checkpoint)
        if is_ours(self) and (fault := checkpoint_fault(Path(checkpoint))):
            raise ValueError(f"cannot resume from {checkpoint}: {fault}. Name an earlier checkpoint.")
        refuse_dropped(self, checkpoint)
        if not is_ours(self):
            return original(self, checkpoint)
        if lacking := lacks_generators(Path(checkpoint)):
            logger.warning("%s: %s; random numbers are not those that the run would have had", checkpoint, lacking)
        if weights_only(Path(checkpoint)):
            logger.warning(
                "%s holds weights alone (save_only_model): moments, subspaces and the schedule of the learning rate "
                "start anew",
                checkpoint,
            )
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


def with_sums(original: Callable[..., None]) -> Callable[..., None]:
    """Gather sharded state before it is written, and write the checksums of the files that have none of their own:
    what says where the shards of a state lie.
    """

    @functools.wraps(original)
    def _save_optimizer_and_scheduler(self: Trainer, output_dir: str) -> None:
        consolidate(self)
        original(self, output_dir)
        if not is_ours(self):
            return
        name_best(self, output_dir)
        if not self.args.should_save:
            return
        folder = Path(output_dir)
        sums = {file.relative_to(folder).as_posix(): zlib.crc32(file.read_bytes()) for file in folder.glob(SHARDED)}
        if sums:
            (folder / SUMS_FILE).write_text(json.dumps(sums, indent=2) + "\n")

    return _save_optimizer_and_scheduler


def name_best(self: Trainer, output_dir: str) -> None:
    """Name the best checkpoint where Trainer looked for its folder before the shards in it were written.

    Some processes would have found it and others not, and each goes by what it has found when training ends.
    """
    if self.is_fsdp_enabled and self.state.best_global_step:
        folder = f"{trainer_utils.PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        best = os.path.join(os.path.dirname(output_dir), folder)
        if os.path.isdir(best):
            self.state.best_model_checkpoint = best


def is_ours(self: Trainer) -> bool:
    """Tell whether a Trainer trains with an optimizer of ours, by its name or however it came to it."""
    return name_of(self.args) in resolve.names() or isinstance(unwrapped(self.optimizer), LowRankOptimizer)


def consolidate(self: Trainer) -> None:
    """Bring the state of an optimizer that shards it to the processes that write: one, or one on every node."""
    optimizer = unwrapped(self.optimizer)
    if not isinstance(optimizer, LowRankOptimizer) or not optimizer.shard_state:
        return
    writing = [False] * dist.get_world_size()
    dist.all_gather_object(writing, self.args.should_save)
    for process in (i for i, writes in enumerate(writing) if writes):
        optimizer.consolidate_state_dict(to=process)


def generators_saved_by(args: TrainingArguments) -> int:
    """Return how many processes write the state of their random generators into a checkpoint's folder."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if args.save_on_each_node else int(args.world_size)


def lacks_generators(path: Path) -> str:
    """Say so where a checkpoint lacks the file of a process that was killed before it wrote it, else "".

    The first process writes the trainer state, and waits for no other.
    """
    if weights_only(path):
        return ""
    state = json.loads((path / trainer.TRAINER_STATE_NAME).read_text())
    wanted = (state.get("stateful_callbacks") or {}).get(SAVED, {}).get(GENERATORS, 1)
    found = len([*path.glob("rng_state*.pth")])
    return f"{found} of {wanted} processes have written their rng_state" if wanted > max(1, found) else ""


def checkpoint_fault(path: Path) -> str | None:
    """Say what keeps a checkpoint folder from being resumed, or None: trainer state and optimizer are as written."""
    try:
        json.loads((path / trainer.TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError) as error:
        return f"{trainer.TRAINER_STATE_NAME} is missing or unreadable ({type(error).__name__})"
    if weights_only(path):
        return None
    if not (path / trainer.SCHEDULER_NAME).exists():  # Trainer would load neither, and say nothing
        return f"{trainer.SCHEDULER_NAME} is missing"
    files = path / trainer.OPTIMIZER_NAME, path / trainer.OPTIMIZER_NAME_BIN  # the second is FSDP's full state dict
    sharded = any((folder / ".metadata").exists() for folder in path.glob("optimizer_*"))  # FSDP's own format
    if not sharded and not any(file.exists() and zipfile.is_zipfile(file) for file in files):
        return f"{trainer.OPTIMIZER_NAME} is missing or unreadable"
    return next(_faults(path), None)


def weights_only(path: Path) -> bool:
    """Tell whether a checkpoint was saved with save_only_model; what else there is comes before the trainer state."""
    return not any(file for pattern in (*ARCHIVES, "optimizer*") for file in path.glob(pattern))


def _faults(path: Path) -> Iterator[str]:
    """Yield which files of a checkpoint are not what was written, by their checksums (CRC32)."""
    try:
        sums = json.loads((path / SUMS_FILE).read_text()) if (path / SUMS_FILE).exists() else {}
        wrong = [name for name, value in sums.items() if zlib.crc32((path / name).read_bytes()) != value]
    except (OSError, ValueError, AttributeError) as error:
        yield f"{SUMS_FILE}, or a file that it names, is damaged ({error})"
    else:
        yield from (f"{name} is damaged: its checksum is not the one in {SUMS_FILE}" for name in wrong)
    for name in (file.name for pattern in ARCHIVES for file in sorted(path.glob(pattern))):
        with (path / name).open("rb") as file:
            if fault := archive_fault(file):
                yield f"{name} is damaged: {fault}"
    for metadata in sorted(path.glob(SHARDED)):
        yield from _shard_faults(metadata.parent)


class _Places(pickle.Unpickler):
    """Reads where torch.distributed.checkpoint says that shards lie: data classes of its own, and no other code."""

    KINDS = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
    OTHERS = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
    }

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.OTHERS or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        found = super().find_class(module, name) if module in self.KINDS and name.isidentifier() else None
        if isinstance(found, type) and found.__module__ == module and (is_dataclass(found) or issubclass(found, Enum)):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, and unpickling that may run code")


def _shard_faults(folder: Path) -> Iterator[str]:
    """Yield what is wrong with a folder of torch.distributed.checkpoint: each file is one archive after another."""
    name = folder.name
    try:
        with (folder / ".metadata").open("rb") as file:
            stored = _Places(file).load().storage_data.values()
        places = sorted({(place.relative_path, place.offset, place.length) for place in stored})
    except Exception as error:  # what unpickles a file that is damaged may raise anything
        yield f"{name}/.metadata is damaged ({type(error).__name__}: {error})"
        return
    for shard, offset, length in places:
        try:
            with (folder / shard).open("rb") as file:
                file.seek(offset)
                archive = io.BytesIO(file.read(length))
        except OSError as error:
            yield f"{name}/{shard} is missing or unreadable ({error.strerror})"
        else:
            if fault := archive_fault(archive):
                yield f"{name}/{shard} is damaged: {fault}"


def archive_fault(file: IO[bytes]) -> str | None:
    """Say what is wrong with an archive that torch.save wrote, such as the checksum of a record, or None."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        file.seek(0)
        torch._C.PyTorchFileReader(file)  # takes offence at headers that zipfile passes over
    except Exception as error:  # a damaged header may ask for a password, another compression, ...
        return str(error).partition(". ")[0] or type(error).__name__
    return f"the checksum of its record {damaged} is wrong" if damaged else None
