"""`python -m hf_lowrank script.py ...` or `-m module ...`: run a Trainer script with the optimizers registered."""

from __future__ import annotations

import argparse
import errno
import os
import re
import runpy
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn


USAGE = """usage: python -m hf_lowrank [--local-metrics] SCRIPT [ARGUMENTS ...]
       python -m hf_lowrank [--local-metrics] -m MODULE [ARGUMENTS ...]

Runs a script or module that uses transformers' Trainer, unchanged, with the optimizers of hf_lowrank
as choices of --optim. Works under torchrun and accelerate launch as well:

  python -m hf_lowrank run_clm.py --optim galore_i3s_adamw --optim_args rank=128,update_proj_gap=200 ...
  torchrun --nproc_per_node 8 -m hf_lowrank run_clm.py --optim fira_i3s_adamw ...
  accelerate launch -m hf_lowrank run_glue.py --optim galore_dominant_adamw ...

options:
  --local-metrics  evaluate.load("accuracy"), ("glue", TASK) and ("mse") take metrics packaged here, which
                   have the same values, instead of fetching them from the hub

names:
"""


def main() -> None:
    """Register, then run the target as if it had been started itself. A user's mistake is one sentence and code 2."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        from hf_lowrank.methods.table import METHODS

        _print(USAGE + "\n".join(f"  {name:24} {method.summary}" for name, method in METHODS.items()))
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        from hf_lowrank import __version__

        _print(f"hf_lowrank {__version__}")
        return
    local_metrics = arguments[0] == "--local-metrics"
    target = arguments[local_metrics:]
    as_module = target[:1] == ["-m"]
    target = target[as_module:]
    if not target or target[0].startswith("-"):
        _stop(f"expected a script or -m MODULE, got {' '.join(arguments)!r}; see --help")
    if not (_has_module(target[0]) if as_module else _is_script(Path(target[0]))):
        _stop(f"no such {'module' if as_module else 'script'}: {target[0]}")
    try:
        _prepare(local_metrics=local_metrics)
    except ModuleNotFoundError as error:
        _stop(str(error))
    try:
        _run(target, as_module=as_module)
    except ValueError as error:
        if unknown := _UNKNOWN_OPTIMIZER.match(str(error)):
            _stop(_no_such_optimizer(unknown[1]))
        if not _raised_here(error):
            raise
        _stop(str(error))
    except Exception as error:
        if not _could_not_write(error):
            raise
        _stop(
            f"the run ended because Trainer could not write its files: {error}. Checkpoints saved before are whole; "
            "make room there, or name another --output_dir"
        )


def _print(text: str) -> None:
    """Print to what may be a pipe that its reader (`head`, say) closes before the end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # what is left goes nowhere; else Python fails once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prepare(*, local_metrics: bool) -> None:
    missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"the Trainer needs what is not installed: pip install {' '.join(missing)}")
    from hf_lowrank.hf.register import register

    register()
    _answer_misspelt_optimizers()
    if local_metrics:
        from hf_lowrank.hf.local_metrics import install

        install()


_NO_CHOICE = re.compile(r"argument --optim: invalid choice: '?([^'\s]+)")
_UNKNOWN_OPTIMIZER = re.compile(r"(\S+) is not a valid OptimizerNames")


def _answer_misspelt_optimizers() -> None:
    """Let argparse answer a misspelt --optim with the nearest name, instead of some two hundred."""
    refuse = argparse.ArgumentParser.error

    def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
        if unknown := _NO_CHOICE.match(message):
            _stop(_no_such_optimizer(unknown[1]))
        refuse(self, message)

    argparse.ArgumentParser.error = error  # type: ignore[method-assign]


def _no_such_optimizer(name: str) -> str:
    """Return a sentence with the nearest name, of ours and transformers' own."""
    from transformers.training_args import OptimizerNames

    from hf_lowrank.methods.suggestions import suggest

    nearest = suggest(name, [member.value for member in OptimizerNames])
    if nearest.startswith("."):  # none is near
        nearest = "; python -m hf_lowrank --help lists ours"
    return f"--optim: there is no optimizer {name!r}{nearest}"


def _is_script(path: Path) -> bool:
    """Tell whether Python can run a path: a file, or a folder with a __main__.py."""
    return (path / "__main__.py").is_file() if path.is_dir() else path.exists()


def _has_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def _run(target: list[str], *, as_module: bool) -> None:
    sys.argv = target
    if as_module:
        sys.path[0] = ""
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(target[0]).resolve().parent)
        runpy.run_path(target[0], run_name="__main__")


def _raised_here(error: ValueError) -> bool:
    """Tell whether this package refused something (an option, a model, a way to train), not the script."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("hf_lowrank.")


_FULL = re.compile(r"PytorchStreamWriter failed|inline_container.*unexpected pos|\(os error \d+\)", re.DOTALL)
"""How torch.save and safetensors say that a file could not be written."""

_REFUSED = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EEXIST")


def _could_not_write(error: Exception) -> bool:
    """Tell whether the disk or the folder refused what Trainer saves."""
    by_system = isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _REFUSED
    writing = {"__init__", "_save_checkpoint", "save_model"}
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return (by_system or bool(_FULL.search(str(error)))) and any(
        frame.f_globals.get("__name__") == "transformers.trainer" and frame.f_code.co_name in writing
        for frame in frames
    )


def _stop(sentence: str) -> NoReturn:
    print(f"python -m hf_lowrank: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
