"""A disk that takes no more ends a run in one sentence, and the checkpoint before it stays whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


SCRIPT = """
import resource, sys
sys.path.insert(0, {folder!r})
from conftest import arguments, train
from transformers import TrainerCallback


class Full(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:  # no file may grow beyond {limit} bytes from here on
            resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))


train(arguments({out!r}, "galore_i3s_adamw", save_strategy="steps", save_steps=2, max_steps=4), callbacks=[Full()])
"""


def test_a_save_that_fails_is_one_sentence_and_the_last_checkpoint_resumes(tmp_path):
    from hf_lowrank.hf.checkpoints import checkpoint_fault

    script = tmp_path / "script.py"
    # 8000 bytes: below the weights and the state, above the lines that a run adds to its own files in two steps
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent), out=str(tmp_path / "out"), limit=8000))
    command = [sys.executable, "-m", "hf_lowrank", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ}, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "the run ended because Trainer could not write its files" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint_fault(tmp_path / "out" / "checkpoint-2") is None
