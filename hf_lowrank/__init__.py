"""Low-rank optimizers as one flag of the Hugging Face Trainer.

The public names load on first use: importing this imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_lowrank import _moved


if TYPE_CHECKING:
    from hf_lowrank.engine.averaging import exclude_from_ddp
    from hf_lowrank.groups import param_groups, target_parameters
    from hf_lowrank.hf.callback import LowRankCallback
    from hf_lowrank.hf.layer_sampling import LayerSampling
    from hf_lowrank.hf.model_card import add_to_model_card
    from hf_lowrank.hf.models import LLAMA, llama_config
    from hf_lowrank.hf.pair import optimizer_cls_and_kwargs
    from hf_lowrank.hf.register import register, unregister
    from hf_lowrank.hf.trainer import LowRankTrainer
    from hf_lowrank.methods.context import ColumnNorms, Columns, Context, Update
    from hf_lowrank.methods.context import ColumnNorms as Facts
    from hf_lowrank.methods.parts import Moments, Reconstruction, Subspace
    from hf_lowrank.methods.registry import Gauge
    from hf_lowrank.methods.table import METHODS, Method
    from hf_lowrank.optimizer import LowRankOptimizer
    from hf_lowrank.planning.budget import fit_budget
    from hf_lowrank.planning.memory import MemoryEstimate, estimate_memory
    from hf_lowrank.state.slots import Slot
    from hf_lowrank.tensors.bases import Basis
    from hf_lowrank.tensors.sums import Sum

__version__ = "0.1.0"
_moved.install()

_LAZY = {
    "METHODS": "methods.table",
    "Method": "methods.table",
    "LowRankOptimizer": "optimizer",
    "LLAMA": "hf.models",
    "llama_config": "hf.models",
    "add_to_model_card": "hf.model_card",
    "exclude_from_ddp": "engine.averaging",
    "param_groups": "groups",
    "target_parameters": "groups",
    "MemoryEstimate": "planning.memory",
    "estimate_memory": "planning.memory",
    "fit_budget": "planning.budget",
    "optimizer_cls_and_kwargs": "hf.pair",
    "register": "hf.register",
    "unregister": "hf.register",
    "LowRankTrainer": "hf.trainer",
    "LowRankCallback": "hf.callback",
    "LayerSampling": "hf.layer_sampling",
    "Subspace": "methods.parts",
    "Moments": "methods.parts",
    "Reconstruction": "methods.parts",
    "Update": "methods.context",
    "Basis": "tensors.bases",
    "Columns": "methods.context",
    "Context": "methods.context",
    "ColumnNorms": "methods.context",
    "Facts": "methods.context",
    "Gauge": "methods.registry",
    "Sum": "tensors.sums",
    "Slot": "state.slots",
}

_RENAMED = {"Facts": "ColumnNorms"}

__all__ = [
    "LLAMA",
    "METHODS",
    "Basis",
    "ColumnNorms",
    "Columns",
    "Context",
    "Facts",
    "Gauge",
    "LayerSampling",
    "LowRankCallback",
    "LowRankOptimizer",
    "LowRankTrainer",
    "MemoryEstimate",
    "Method",
    "Moments",
    "Reconstruction",
    "Slot",
    "Subspace",
    "Sum",
    "Update",
    "__version__",
    "add_to_model_card",
    "estimate_memory",
    "exclude_from_ddp",
    "fit_budget",
    "llama_config",
    "optimizer_cls_and_kwargs",
    "param_groups",
    "register",
    "target_parameters",
    "unregister",
]


def __getattr__(name: str) -> Any:
    if name in _moved.MOVED:
        import_module(f"hf_lowrank.{name}")  # says where it is now
    if name not in _LAZY:
        raise AttributeError(f"module 'hf_lowrank' has no attribute {name!r}")
    return getattr(import_module(f"hf_lowrank.{_LAZY[name]}"), _RENAMED.get(name, name))


def __dir__() -> list[str]:
    return sorted(__all__)


def load_ipython_extension(ipython: Any) -> None:
    """Register the optimizers: `%load_ext hf_lowrank`."""
    import_module("hf_lowrank.hf.register").register()


def unload_ipython_extension(ipython: Any) -> None:
    """Undo it: `%unload_ext hf_lowrank`."""
    import_module("hf_lowrank.hf.register").unregister()
