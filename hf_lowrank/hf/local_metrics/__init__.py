"""Metrics that `evaluate.load` finds without a hub: `python -m hf_lowrank --local-metrics script.py ...`.

Each file beside this one is a metric module as `evaluate` reads it: one metric, one import per line (a list behind one
`import` is misread), nothing imported from this package, since `evaluate` runs a copy of the file.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any


NAMES = ("accuracy", "glue", "mse")
"""The metrics that transformers' run_clm.py and run_glue.py ask for."""

_NEEDED = {"evaluate": "evaluate", "datasets": "datasets", "sklearn": "scikit-learn", "scipy": "scipy"}


def path(name: str) -> str:
    """Return the file of a metric, for `evaluate.load(path("glue"), "cola")`."""
    return str(Path(__file__).with_name(f"{name}.py"))


def install() -> None:
    """Make `evaluate.load` take the metrics in NAMES from here; others it loads as ever. Twice is the same as once.

    Raises:
        ModuleNotFoundError: if a package is missing that the metrics need; the message names it.
    """
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        lacking = " ".join(missing)
        raise ModuleNotFoundError(f"the local metrics need packages that are not installed: pip install {lacking}")
    import evaluate

    original = evaluate.load
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        return original(path(name) if name in NAMES else name, *args, **kwargs)

    evaluate.load = load
