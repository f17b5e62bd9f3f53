"""The shares of outliers in the layers of a model, by which OwLore draws them.

Legend: W weight (outputs, inputs) · X inputs of a matrix (tokens, inputs) · A_ij = |W_ij| ||X_j||.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from hf_lowrank import modules
from hf_lowrank.layer_sampling import Layers, OwLore, Rule


@torch.no_grad()
def outlier_shares(layers: Layers, model: nn.Module, batches: Iterable[Any]) -> list[float]:
    """Return for every layer the share of the entries A_ij of its matrices that are above a multiple of their mean.

    Args:
        layers: the layers; their rule says which multiple.
        model: what they are a part of.
        batches: keyword arguments of the model, for the inputs X.

    References:
        OWL, arXiv 2310.05175: layerwise outlier distribution.
    """
    assert isinstance(layers.rule, OwLore)
    linear = [[m for m in layer.modules() if modules.is_linear(m)] for layer in layers.modules]
    squares: dict[nn.Module, Tensor] = {}
    training = model.training
    with ExitStack() as stack:
        for module in (m for some in linear for m in some):
            stack.callback(module.register_forward_pre_hook(partial(_add_squares, squares)).remove)
        stack.callback(model.train, training)
        model.eval()
        taken = inspect.signature(model.forward).parameters
        anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
        for batch in batches:  # of what a loss of the user's own reads beside them, what the model does not name
            model(**{key: x for key, x in batch.items() if anything or key in taken})
    return [_share([m for m in some if m in squares], squares, layers.rule.outlier_threshold) for some in linear]


def _add_squares(squares: dict[nn.Module, Tensor], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    X = inputs[0].reshape(-1, inputs[0].shape[-1])
    squares[module] = squares.get(module, 0) + X.float().square().sum(0)


def _share(linear: list[nn.Module], squares: dict[nn.Module, Tensor], threshold: float) -> float:
    def entries(module: nn.Module) -> Tensor:
        W: Any = module.weight
        norms = squares[module].sqrt()
        A: Tensor = W.float().abs() * (norms if isinstance(module, nn.Linear) else norms.unsqueeze(-1))
        return A  # that of transformers' Conv1D lies transposed, as its weight does

    count = sum(entries(m).numel() for m in linear)
    mean = sum(float(entries(m).double().sum()) for m in linear) / max(1, count)
    return sum(int((entries(m) > threshold * mean).sum()) for m in linear) / max(1, count)


def calibration_batches(loader: Any, args: Any, rule: Rule) -> Iterator[Any]:
    """Yield the first batches of a dataset, in its own order; the global generators end as they were.

    Args:
        loader: the training's.
        args: the training arguments, for the size of a batch and the device.
        rule: how many.
    """
    assert isinstance(rule, OwLore)
    size, dataset = args.per_device_train_batch_size, loader.dataset
    with _own_randomness():
        streams = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
        rows = iter(dataset) if streams else (dataset[i] for i in range(len(dataset)))
        for _ in range(rule.calibration_batches):
            if not (some := list(islice(rows, size))):
                return
            batch = loader.collate_fn(some)
            if not isinstance(batch, Mapping):
                raise ValueError(
                    "OwLore looks at the inputs of every layer before the training, and its batches are no keyword "
                    f"arguments of the model, but of type {type(batch).__name__}: use layer_sampling=lisa"
                )
            yield {key: x.to(args.device) if isinstance(x, Tensor) else x for key, x in batch.items()}


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Put the global generators back: a collator may draw masks."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
