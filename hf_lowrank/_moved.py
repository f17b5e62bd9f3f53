"""Where modules went that used to lie directly in the package: importing one says so."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType


MOVED = {
    "allocation": "engine.plan and hf_lowrank.engine.sharding",
    "autoload": "hf.autoload",
    "axolotl": "hf.axolotl",
    "bases": "tensors.bases",
    "callback": "hf.callback",
    "checkpoints": "hf.checkpoints",
    "checks": "engine.checks and hf_lowrank.engine.checkpoint",
    "dense": "engine.dense",
    "describe": "observe.describe",
    "distributed": "engine.collectives",
    "formats": "state.formats and hf_lowrank.state.slots",
    "layerwise": "engine.layerwise",
    "linalg": "tensors.kernels, hf_lowrank.tensors.random and hf_lowrank.tensors.rounding",
    "local_metrics": "hf.local_metrics",
    "matrices": "tensors.layout",
    "memory": "planning.memory and hf_lowrank.planning.budget",
    "metrics": "observe.metrics",
    "model_card": "hf.model_card",
    "models": "hf.models",
    "moments": "methods.moments",
    "options": "methods.options",
    "parts": "methods.parts",
    "reconstructions": "methods.reconstructions",
    "records": "observe.records",
    "refreshes": "engine.refresh",
    "report": "observe.report",
    "rows": "methods.table",
    "schedule": "engine.schedule",
    "steps": "engine.matrix",
    "subspaces": "methods.subspaces",
    "targets": "planning.targets",
    "trainer": "hf.trainer, hf_lowrank.hf.register and hf_lowrank.hf.arguments",
}
PICKLED = {"hf_lowrank.optimizer_names": "hf_lowrank.hf.names"}
"""Modules that older training_args.bin name."""


class Finder:
    """The last finder: it is asked for a module only where there is none."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Send what pickles name to its new place, and say of anything else that moved where it is."""
        if name in PICKLED:
            return spec_from_loader(name, _Alias(), origin=PICKLED[name])
        package, _, rest = name.partition(".")
        if package == "hf_lowrank" and rest in MOVED:
            raise ModuleNotFoundError(f"hf_lowrank.{rest} is now hf_lowrank.{MOVED[rest]}", name=name)
        return None


class _Alias(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return import_module(PICKLED[spec.name])

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: it has run under its own name."""


def install() -> None:
    """Put the finder behind all others, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
