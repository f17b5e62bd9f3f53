"""Scripts on several processes."""

import json
import os
import subprocess
import sys

import pytest
import torch


FSDP2 = {
    *("fsdp", "pieces", "rules", "mixed", "resume", "begin", "pass", "end", "equal", "moves", "torch_plan"),
    *("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
}
"""Arguments of the scripts that shard."""


def torchrun(processes, script, *arguments):
    """Run a script under torchrun on a free port, one thread each; return what it printed."""
    if FSDP2 & set(map(str, arguments)) and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"torch {torch.__version__} has no FSDP2 on the CPU: its streams there record no events")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def reported(processes, script, output, *arguments, check=()):
    """Run a script that writes what it finds to `output`; return that.

    Args:
        processes, script: see `torchrun`.
        output: a JSON file, the second argument of the script, or the first where there is no check.
        arguments: of the script, behind it.
        check: its first argument.
    """
    output.unlink(missing_ok=True)
    first = [check] if check else []
    result = torchrun(processes, script, *first, output, *arguments)
    assert output.exists(), result.stderr[-4000:]
    return json.loads(output.read_text())
