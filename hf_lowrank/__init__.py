"""Low-rank optimizers as one flag of the Hugging Face Trainer. Importing this imports neither torch nor transformers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_lowrank.methods import METHODS, Method
    from hf_lowrank.optimizer import LowRankOptimizer

__version__ = "0.1.0"

_LAZY = {
    "METHODS": "hf_lowrank.methods",
    "Method": "hf_lowrank.methods",
    "LowRankOptimizer": "hf_lowrank.optimizer",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hf_lowrank' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
