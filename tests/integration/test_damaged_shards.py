"""A byte that changed in a checkpoint of several processes is found, and the file is named."""

import io
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from processes import on_processes
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import trainer_utils

from hf_lowrank.hf.checkpoints import SUMS_FILE, checkpoint_fault


pytestmark = pytest.mark.processes
WORKER = Path(__file__).parent / "parallel_worker.py"
SHARDED = ("SHARDED_STATE_DICT", "galore_dominant_adamw")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two processes under FSDP2, with checkpoints after three and six steps."""
    folder = tmp_path_factory.mktemp("sharded")
    result = on_processes(2, WORKER, *SHARDED, folder)
    assert (folder / "report.json").exists(), result.stderr[-4000:]
    return folder / "first"


@pytest.fixture
def damaged(run, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(run, tmp_path / "first")


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 0xFF
    file.write_bytes(data)


def flips(file, places):
    """Flip one byte after the other; yield its place while it is flipped."""
    for at in places:
        flip(file, at)
        yield at
        flip(file, at)


def archives(folder):
    """Where in which file of a folder of shards the archives lie."""
    stored = FileSystemReader(folder).read_metadata().storage_data.values()
    return sorted({(place.relative_path, place.offset, place.length) for place in stored})


@pytest.mark.parametrize("folder", ["optimizer_0", "pytorch_model_fsdp_0"])
def test_a_flipped_byte_is_found_or_does_no_harm(folder, damaged):
    checkpoint = damaged / "checkpoint-6"
    assert checkpoint_fault(checkpoint) is None
    found = harmless = 0
    for name, offset, length in archives(checkpoint / folder)[::20]:
        file = checkpoint / folder / name

        def value(file=file, offset=offset, length=length):
            return torch.load(io.BytesIO(file.read_bytes()[offset : offset + length]))

        whole = value()
        for _ in flips(file, range(offset, offset + length, 97)):
            fault = checkpoint_fault(checkpoint)
            if fault is None:  # it fills up a gap, say: what is loaded is the same
                now = value()
                assert torch.equal(whole, now) if isinstance(whole, torch.Tensor) else whole == now
                harmless += 1
            else:
                assert fault.startswith(f"{folder}/{name} is damaged: ") and "\n" not in fault
                found += 1
    assert found > harmless
    metadata = checkpoint / folder / ".metadata"
    for _ in flips(metadata, range(0, metadata.stat().st_size, 997)):
        assert checkpoint_fault(checkpoint).startswith(f"{folder}/.metadata is damaged: ")
    assert checkpoint_fault(checkpoint) is None


class Harmful:
    """What runs as it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("place", ["optimizer_0", "of_somebody"])
def test_looking_for_damage_runs_nothing_that_a_checkpoint_holds(place, damaged, tmp_path):
    checkpoint, ran = damaged / "checkpoint-6", tmp_path / "ran"
    (checkpoint / place).mkdir(exist_ok=True)
    (checkpoint / place / ".metadata").write_bytes(pickle.dumps(Harmful(ran)))
    (checkpoint / SUMS_FILE).unlink()
    fault = checkpoint_fault(checkpoint)
    assert fault.startswith(f"{place}/.metadata is damaged") and "may run code" in fault
    assert not ran.exists()
    pickle.loads(pickle.dumps(Harmful(ran)))
    assert ran.exists()  # it would have run


def numbers(folder):
    """The place of a byte of the largest tensor in a folder of shards."""
    name, offset, length = max(archives(folder), key=lambda archive: archive[2])
    tensor = torch.load(io.BytesIO((folder / name).read_bytes()[offset : offset + length]))
    return folder / name, offset + (folder / name).read_bytes()[offset:].find(tensor.numpy().tobytes())


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_the_last_whole_checkpoint_is_the_one_before(how, damaged):
    file, at = numbers(damaged / "checkpoint-6" / "optimizer_0")
    if how == "flipped":
        flip(file, at)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:at])
    else:
        file.unlink()
    assert f"optimizer_0/{file.name} is " in checkpoint_fault(damaged / "checkpoint-6")
    assert trainer_utils.get_last_checkpoint(str(damaged)) == str(damaged / "checkpoint-3")


@pytest.mark.parametrize(
    "name",
    [
        "optimizer_0",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("rng_state_1.pth", "hf_lowrank_sums.json")),
    ],
)
def test_it_is_not_resumed(name, damaged, tmp_path):
    checkpoint = damaged / "checkpoint-6"
    flip(*(numbers(checkpoint / name) if name == "optimizer_0" else (checkpoint / name, 300 if "rng" in name else 40)))
    result = on_processes(2, WORKER, *SHARDED, tmp_path, checkpoint)
    assert result.returncode != 0
    assert f"ValueError: cannot resume from {checkpoint}: {name}" in result.stderr
    assert "is damaged" in result.stderr and "Name an earlier checkpoint." in result.stderr


def test_without_sums_as_other_programs_leave_it_the_archives_are_still_looked_at(damaged):
    checkpoint = damaged / "checkpoint-6"
    (checkpoint / "hf_lowrank_sums.json").unlink()
    assert checkpoint_fault(checkpoint) is None
    flip(*numbers(checkpoint / "optimizer_0"))
    assert "the checksum of its record archive/data/0 is wrong" in checkpoint_fault(checkpoint)
