"""Whether a checkpoint gives back every weight that was trained.

transformers writes the weights of some architectures (Mixtral, GPT-NeoX, ViT) under other names than they have in the
model, which from_pretrained translates and Trainer does not: it would go on from those that the model began with. Of a
peft model it writes the adapters alone.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, utils

from hf_lowrank.hf.checkpoints import is_ours
from hf_lowrank.tensors.layout import local


logger = logging.getLogger("hf_lowrank")


def with_every_weight(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Trainer._load_from_checkpoint`: a run of ours goes on from every weight that was saved."""

    @functools.wraps(original)
    def _load_from_checkpoint(self: Trainer, resume_from_checkpoint: str, model: Any = None) -> None:
        original(self, resume_from_checkpoint, *([] if model is None else [model]))
        if is_ours(self) and not self.is_fsdp_enabled:  # whose files have the names of the model
            read_rest_(self.model if model is None else model, Path(resume_from_checkpoint))

    return _load_from_checkpoint


def with_every_best_weight(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `Trainer._load_best_model` in the same way."""

    @functools.wraps(original)
    def _load_best_model(self: Trainer) -> None:
        original(self)
        if is_ours(self) and not self.is_fsdp_enabled:
            read_rest_(self.model, Path(self.state.best_model_checkpoint))

    return _load_best_model


def read_rest_(model: nn.Module, folder: Path) -> None:
    """Give a model those weights of a checkpoint that have other names there, as from_pretrained reads them.

    Raises:
        ValueError: if the checkpoint has not all of them.
    """
    if not isinstance(model, PreTrainedModel) or not (rest := absent(model, names_in(folder))):
        return
    kind, error = type(model), None
    lacking: Any = rest
    try:
        with torch.random.fork_rng(devices=[]):
            whole, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)  # all fit in it
        lacking = set(rest) & set(found["missing_keys"])
    except (OSError, ValueError, RuntimeError) as reason:
        error = reason
    if lacking:
        raise ValueError(
            f"{folder} has not all weights of this {kind.__name__}: {', '.join(sorted(lacking)[:3])}"
            f"{', ...' if len(lacking) > 3 else ''} would stay as the model began. Give Trainer the model that was "
            "trained, or name another checkpoint"
        ) from error
    model.load_state_dict(whole.state_dict(), strict=False)
    logger.info("%s has %d weights under other names: they were read by from_pretrained", folder, len(rest))


def names_in(folder: Path) -> set[str]:
    """Return the names of the weights in a checkpoint; none where they are not in transformers' own format."""
    for index in (utils.SAFE_WEIGHTS_INDEX_NAME, utils.WEIGHTS_INDEX_NAME):
        if (folder / index).exists():
            return set(json.loads((folder / index).read_text())["weight_map"])
    if (file := folder / utils.SAFE_WEIGHTS_NAME).exists():
        with safe_open(file, framework="pt") as weights:
            return set(weights.keys())
    if (file := folder / utils.WEIGHTS_NAME).exists():
        return set(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    return set()


def absent(model: PreTrainedModel, names: set[str]) -> list[str]:
    """Return which weights of a model are not among `names`; not those that are tied to one that is, nor what the
    model does not save."""
    if not names:
        return []
    state, known = model.state_dict(), names.union(model._keys_to_ignore_on_save or ())
    held = {local(state[name]).data_ptr() for name in names & state.keys()}
    return [name for name, w in state.items() if name not in known and local(w).data_ptr() not in held]


def check_saved(model: Any, params: Collection[Tensor], *, resumed: bool) -> None:
    """Say which of the parameters that are trained no checkpoint of a peft model will hold.

    Raises:
        ValueError: if there are any, of a run that goes on from a checkpoint.
    """
    names = unsaved(model, params)
    if not names:
        return
    text = (
        f"checkpoints of a peft model hold its adapters and modules_to_save alone; {len(names)} other parameters are "
        f"trained too ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}). Name their modules in "
        "modules_to_save, or train the model without peft"
    )
    if resumed:
        raise ValueError(f"cannot resume: {text}. As it is, they would go on from what the model began with")
    logger.warning("%s. As it is, what they learn is lost with this process, and the run cannot be resumed", text)


def unsaved(model: Any, params: Collection[Tensor]) -> list[str]:
    """Return the names of those of some parameters that peft does not save; none of any other model."""
    if not hasattr(model, "peft_config") or not utils.is_peft_available():
        return []
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return []
    saved = [get_peft_model_state_dict(model, adapter_name=name) for name in model.peft_config]
    places = {tensor.data_ptr() for tensors in saved for tensor in tensors.values()}
    trained = set(map(id, params))
    return [name for name, p in model.named_parameters() if id(p) in trained and p.data_ptr() not in places]
