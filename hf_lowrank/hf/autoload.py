"""Opt-in: with HF_LOWRANK_AUTOLOAD=1 a plain `python run_clm.py --optim galore_i3s_adamw` works.

torch calls `autoload` at the end of `import torch` (entry point group torch.backends). An exception here would make
that import fail, so nothing is imported; a hook waits for transformers, and for the plug-ins of LLaMA-Factory v1.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any


LLAMA_FACTORY = "llamafactory.v1.plugins.trainer_plugins.optimizer"


def autoload() -> None:
    """Register the optimizers as soon as what names them is imported, if the variable asks for it."""
    if os.environ.get("HF_LOWRANK_AUTOLOAD") != "1":
        return
    if "transformers.trainer" in sys.modules:
        _after_import("transformers.trainer", sys.modules["transformers.trainer"])
        return
    if "transformers.training_args" in sys.modules:  # which has imported torch, before the hook is there
        sys.modules["transformers.training_args"].__class__ = _BegunBefore
    if not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())


class _Hook:
    """Finder that lets the real one work and acts once the module has run."""

    watched = ("transformers.training_args", "transformers.trainer", LLAMA_FACTORY)
    busy = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.watched or self.busy:
            return None
        self.busy = True
        try:
            spec = find_spec(name)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _after_import(name, module)

        loader.exec_module = exec_module
        return spec


class _BegunBefore(ModuleType):
    """A module that had begun to run before the hook was there: act as soon as something is taken from it."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in ("OptimizerNames", "TrainingArguments"):
            self.__class__ = ModuleType  # type: ignore[assignment]
            _after_import(self.__name__, self)
        return value


def _after_import(name: str, module: Any) -> None:
    if name.endswith("training_args"):  # the names are wanted as soon as arguments are parsed
        from hf_lowrank.hf.names import add_to

        add_to(module.OptimizerNames)
    elif name == LLAMA_FACTORY:
        from hf_lowrank.hf import llamafactory

        llamafactory.register()
    else:
        from hf_lowrank.hf.register import register

        register()
