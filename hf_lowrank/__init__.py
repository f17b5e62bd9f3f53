"""Low-rank optimizers as one flag of the Hugging Face Trainer.

The public names load on first use: importing this imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_lowrank.bases import Basis
    from hf_lowrank.callback import LowRankCallback
    from hf_lowrank.formats import Slot
    from hf_lowrank.groups import param_groups, target_parameters
    from hf_lowrank.memory import MemoryEstimate, estimate_memory, fit_budget
    from hf_lowrank.methods import METHODS, Method
    from hf_lowrank.model_card import add_to_model_card
    from hf_lowrank.models import LLAMA, llama_config
    from hf_lowrank.optimizer import LowRankOptimizer
    from hf_lowrank.parts import Columns, Context, Facts, Moments, Reconstruction, Subspace, Update
    from hf_lowrank.trainer import LowRankTrainer, optimizer_cls_and_kwargs, register, unregister

__version__ = "0.1.0"

_LAZY = {
    "METHODS": "methods",
    "Method": "methods",
    "LowRankOptimizer": "optimizer",
    "LLAMA": "models",
    "llama_config": "models",
    "add_to_model_card": "model_card",
    "param_groups": "groups",
    "target_parameters": "groups",
    "MemoryEstimate": "memory",
    "estimate_memory": "memory",
    "fit_budget": "memory",
    "optimizer_cls_and_kwargs": "trainer",
    "register": "trainer",
    "unregister": "trainer",
    "LowRankTrainer": "trainer",
    "LowRankCallback": "callback",
    "Subspace": "parts",
    "Moments": "parts",
    "Reconstruction": "parts",
    "Update": "parts",
    "Basis": "bases",
    "Columns": "parts",
    "Context": "parts",
    "Facts": "parts",
    "Slot": "formats",
}

__all__ = [
    "LLAMA",
    "METHODS",
    "Basis",
    "Columns",
    "Context",
    "Facts",
    "LowRankCallback",
    "LowRankOptimizer",
    "LowRankTrainer",
    "MemoryEstimate",
    "Method",
    "Moments",
    "Reconstruction",
    "Slot",
    "Subspace",
    "Update",
    "__version__",
    "add_to_model_card",
    "estimate_memory",
    "fit_budget",
    "llama_config",
    "optimizer_cls_and_kwargs",
    "param_groups",
    "register",
    "target_parameters",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'hf_lowrank' has no attribute {name!r}")
    return getattr(import_module(f"hf_lowrank.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(ipython: Any) -> None:
    """Register the optimizers: `%load_ext hf_lowrank`."""
    import_module("hf_lowrank.trainer").register()


def unload_ipython_extension(ipython: Any) -> None:
    """Undo it: `%unload_ext hf_lowrank`."""
    import_module("hf_lowrank.trainer").unregister()
