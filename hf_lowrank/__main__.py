"""`python -m hf_lowrank script.py ...` or `-m module ...`: run a Trainer script with the optimizers registered."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


USAGE = """usage: python -m hf_lowrank SCRIPT [ARGUMENTS ...]
       python -m hf_lowrank -m MODULE [ARGUMENTS ...]

Runs a script or module that uses transformers' Trainer, unchanged, with the optimizers of hf_lowrank
as choices of --optim. Works under torchrun and accelerate launch as well:

  python -m hf_lowrank run_clm.py --optim galore_i3s_adamw --optim_args rank=128,update_proj_gap=200 ...
  torchrun --nproc_per_node 8 -m hf_lowrank run_clm.py --optim fira_i3s_adamw ...
  accelerate launch -m hf_lowrank run_glue.py --optim galore_dominant_adamw ...

names:
"""


def main() -> None:
    """Register, then run the target as if it had been started itself."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        from hf_lowrank.methods import METHODS

        print(USAGE + "\n".join(f"  {name:24} {method.summary}" for name, method in METHODS.items()))
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        from hf_lowrank import __version__

        print(f"hf_lowrank {__version__}")
        return
    as_module = arguments[0] == "-m"
    target = arguments[1:] if as_module else arguments
    if not target or target[0].startswith("-"):
        sys.exit(f"python -m hf_lowrank: expected a script or -m MODULE, got {' '.join(arguments)!r}; see --help")
    if not as_module and not Path(target[0]).exists():
        sys.exit(f"python -m hf_lowrank: no such script: {target[0]}")

    from hf_lowrank.trainer import register

    register()
    sys.argv = target
    if as_module:
        sys.path[0] = ""
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(target[0]).resolve().parent)
        runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main()
