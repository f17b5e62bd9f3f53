"""Scripts on several processes."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch


FSDP2 = {
    *("fsdp", "pieces", "rules", "mixed", "resume", "begin", "pass", "end", "equal", "moves", "torch_plan"),
    *("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
}
"""Arguments of the scripts that shard."""

SECONDS = 1200
"""That a run may take."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch.distributed.fsdp", "torch.distributed.tensor", "transformers.trainer", "accelerate"]
)


def torchrun(processes, script, *arguments):
    """Run a script under torchrun on a free port, one thread each; return what it printed."""
    skip_unless_supported(arguments)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def on_processes(processes, script, *arguments):
    """Do what `torchrun` does, on forks of a process that has imported torch, transformers and accelerate already.

    They have one hash seed, and what those read of the environment when they are imported was read once.
    """
    skip_unless_supported(arguments)
    with pytest.MonkeyPatch.context() as patch:  # a fork imports the package by itself, from its own path
        patch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
        forkserver.ensure_running()
    command = [str(script), *map(str, arguments)]
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = []
        try:
            for rank in range(processes):
                environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(FORKS.Process(target=_be_rank, args=(command, environment, os.getcwd(), folder)))
                ranks[-1].start()
            code = _ended(ranks)
        finally:  # one that failed leaves the others waiting for it
            for one in ranks:
                if one.pid is not None:
                    one.kill()
                    one.join()
        out, err = ("".join(file.read_text() for file in sorted(folder.glob(f"*.{kind}"))) for kind in ("out", "err"))
    if code is None:
        raise subprocess.TimeoutExpired(command, SECONDS, out, err)
    return subprocess.CompletedProcess(command, code, out, err)


def _ended(ranks):
    """Wait for processes; return 0, the code of the first that failed, or None if they take too long."""
    until = time.monotonic() + SECONDS
    while running := [one for one in ranks if one.is_alive()]:
        if failed := [one.exitcode for one in ranks if one.exitcode]:
            wait([one.sentinel for one in running], 5)  # they may have something to say of it
            return failed[0]
        if not wait([one.sentinel for one in running], until - time.monotonic()):
            return None
    return next((one.exitcode for one in ranks if one.exitcode), 0)


def _be_rank(command, environment, directory, folder):
    """Be one process of a run: its script is the main program."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    for number, kind in ((1, "out"), (2, "err")):
        with open(folder / f"{environment['RANK']}.{kind}", "wb") as file:
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def skip_unless_supported(arguments):
    """Skip the test if it shards and this torch cannot on a CPU."""
    if FSDP2 & set(map(str, arguments)) and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} has no FSDP2 on the CPU: its streams there record no events")


def reported(processes, script, output, *arguments, check=()):
    """Run a script that writes what it finds to `output`; return that.

    Args:
        processes, script: see `on_processes`.
        output: a JSON file, the second argument of the script, or the first where there is no check.
        arguments: of the script, behind it.
        check: its first argument.
    """
    output.unlink(missing_ok=True)
    first = [check] if check else []
    result = on_processes(processes, script, *first, output, *arguments)
    assert output.exists(), result.stderr[-4000:]
    return json.loads(output.read_text())
