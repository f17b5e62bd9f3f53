"""One run at a time in an output folder, and only in one that can be written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import arguments, tiny_llama, train
from processes import torchrun
from transformers import Trainer, TrainerCallback

import hf_lowrank
from hf_lowrank.observe import folder as folders


pytestmark = pytest.mark.processes
WORKER = Path(__file__).parent / "folder_worker.py"


def start(*words):
    command = [sys.executable, "-m", "hf_lowrank", str(WORKER), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def ended(process):
    """Return the exit code and what was said."""
    said = process.communicate(timeout=300)[1]
    return process.returncode, said


@pytest.fixture
def waiting(tmp_path):
    """A process that trains in the folder `out`, in its third step."""
    process = start("registered", tmp_path / "out", "wait")
    while not (tmp_path / "out" / "waiting-0").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


def steps(folder):
    return len((folder / "hf_lowrank_steps.jsonl").read_text().splitlines())


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(waiting, tmp_path):
    out = tmp_path / "out"
    for way in ("registered", "by-hand"):
        code, said = ended(start(way, out))
        assert code == 2 and "Traceback" not in said
        assert f"process {waiting.pid} on " in said and "name another --output_dir, or end that run first" in said
    assert waiting.poll() is None and steps(out) == 2
    (tmp_path / "go").touch()
    assert ended(waiting)[0] == 0 and steps(out) == 4
    assert not list(out.glob("*.lock"))  # and the folder is free
    assert ended(start("LowRankTrainer", out))[0] == 0


def test_several_processes_are_refused_as_one(waiting, tmp_path):
    result = torchrun(2, "-m", "hf_lowrank", WORKER, "registered", tmp_path / "out")
    assert result.returncode != 0
    assert result.stderr.count(f"process {waiting.pid} on ") == 1


def test_a_killed_run_leaves_its_folder_to_the_next_one_at_once(waiting, tmp_path):
    waiting.send_signal(signal.SIGKILL)
    waiting.wait()
    assert (tmp_path / "out" / "_hf_lowrank.lock").exists()
    folders.hold(tmp_path / "out")  # though the process that loaded the data lives on for some seconds
    folders.let_go(tmp_path / "out")
    (tmp_path / "go").touch()
    code, said = ended(start("registered", tmp_path / "out"))
    assert code == 0, said
    assert steps(tmp_path / "out") == 4 and not list((tmp_path / "out").glob("*.lock"))


class Interrupting(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("trainer_class", [Trainer, hf_lowrank.LowRankTrainer])
def test_an_interrupted_run_leaves_its_folder_while_its_process_lives(trainer_class, tmp_path):
    held = []

    class Looking(Interrupting):
        def on_step_begin(self, args, state, control, **kwargs):
            held.extend(tmp_path.glob("*.lock"))

    with pytest.raises(KeyboardInterrupt):
        train(arguments(tmp_path, "galore_i3s_adamw"), trainer_class=trainer_class, callbacks=[Looking()])
    assert len(held) == 1 and not list(tmp_path.glob("*.lock")) and not folders._held


def test_a_process_may_train_in_a_folder_again_and_again(tmp_path):
    args = arguments(tmp_path, "galore_i3s_adamw", max_steps=2)
    trainer = train(args)
    trainer.train()
    train(args)
    hf_lowrank.unregister()  # nothing sees the interruption then: the folder stays with this process
    model = tiny_llama()
    for callbacks in ([hf_lowrank.LowRankCallback(), Interrupting()], [hf_lowrank.LowRankCallback()]):
        built = hf_lowrank.optimizer_cls_and_kwargs(model, "galore_i3s_adamw", args=args, rank=4)
        interrupted = len(callbacks) == 2
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            train(args, model, callbacks=callbacks, optimizer_cls_and_kwargs=built)
        assert bool(list(tmp_path.glob("*.lock"))) == interrupted


def test_a_folder_that_cannot_be_made_is_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    code, said = ended(start("registered", tmp_path / "file" / "out"))
    assert code == 2 and "Traceback" not in said and "another --output_dir" in said and str(tmp_path / "file") in said
    with pytest.raises(ValueError, match=r"cannot be written \(.*Not a directory.*\): name another --output_dir"):
        folders.hold(tmp_path / "file" / "out")


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path):
    train(arguments(tmp_path, "galore_i3s_adamw", max_steps=1))  # what is imported late is imported now
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        if os.getuid() == 0:  # whom permissions do not stop
            os.seteuid(65534)
        try:
            with pytest.raises(ValueError, match=r"cannot be written \(.*Permission denied.*\): name another"):
                train(arguments(Path(name), "galore_i3s_adamw"))
        finally:
            os.seteuid(os.getuid())
        assert not list(Path(name).iterdir())
