"""Scripts on several processes."""

import os
import subprocess
import sys


def torchrun(processes, script, *arguments):
    """Run a script under torchrun on a free port, one thread each; return what it printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
