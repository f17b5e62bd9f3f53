"""A run killed with SIGKILL, while training and in the middle of a save, ends as the uninterrupted run does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


pytestmark = pytest.mark.processes
WORKER = Path(__file__).parent / "kill_worker.py"


def start(optim, folder):
    log = (folder.parent / f"{folder.name}.log").open("a")
    command = [sys.executable, str(WORKER), optim, str(folder)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def unfinished_save(folder):
    return any(not (path / "trainer_state.json").exists() for path in folder.glob("checkpoint-*"))


def saved_steps(folder):
    return [int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")]


def kill_when(process, condition):
    """SIGKILL as soon as the condition holds; tell whether it came to that before the process ended."""
    while process.poll() is None:
        if condition():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.0005)
    return False


@pytest.mark.parametrize("optim", ["fira_i3s_adamw", pytest.param("galore_hybrid_adamw_8bit", marks=pytest.mark.full)])
def test_a_killed_run_ends_as_the_uninterrupted_one(optim, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(optim, whole).wait(timeout=300) == 0
    # while it trains, then in the middle of two saves: the folder is there, its last file is not
    conditions = [lambda: 3 in saved_steps(cut), lambda: unfinished_save(cut), lambda: unfinished_save(cut)]
    killed = [kill_when(start(optim, cut), condition) for condition in conditions]
    assert killed[0]
    for _ in range(2):  # the kill of a save may have come so early that one more start is needed to clean up
        if not (cut / "final.pt").exists():
            start(optim, cut).wait(timeout=300)
    log = (tmp_path / "cut.log").read_text()
    assert (cut / "final.pt").exists(), log[-4000:]
    ends = [torch.load(folder / "final.pt") for folder in (whole, cut)]
    assert all(torch.equal(a, b) for a, b in zip(ends[0]["weights"], ends[1]["weights"], strict=True))
    assert ends[0]["history"] == ends[1]["history"]
    lines = [(folder / "hf_lowrank_refreshes.jsonl").read_text() for folder in (whole, cut)]
    assert lines[0] == lines[1]
