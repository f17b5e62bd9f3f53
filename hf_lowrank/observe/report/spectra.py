"""Singular values of what weights changed by between two checkpoints."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.observe.records import module_type
from hf_lowrank.observe.report.runs import Run


def weight_change(run: Run, matrices: int) -> tuple[tuple[int, int], dict[str, list[float]]] | None:
    """Return (steps of the two checkpoints, normalised singular values by name) of a run's last two checkpoints.

    Args:
        run: the run.
        matrices: how many of every module type, spread evenly over the layers.

    Returns:
        sigma_i / sigma_1 in descending order for each matrix; None where there are not two checkpoints with weights.

    Raises:
        ValueError: if the weights of a checkpoint cannot be read, or none of them can be compared.
    """
    usable = [(step, path) for step, path in run.checkpoints if _files(path)]
    if len(usable) < 2 or matrices < 1:
        return None
    (first, a), (last, b) = usable[-2:]
    old, new = _Weights(a), _Weights(b)
    targets = _targets(run, old, new)
    result, left = {}, 0
    for name in _some(targets, matrices):
        before, after = _matrix(old[name]), _matrix(new[name])
        change = after - before if after.shape == before.shape else after.new_full((1, 1), math.nan)
        if not change.isfinite().all():
            left += 1
        elif (sigma := torch.linalg.svdvals(change))[0] > 0:
            result[name] = (sigma / sigma[0]).tolist()
    if left and not result:
        raise ValueError(f"weights of checkpoints {first} and {last} are not finite, or of other shapes")
    return ((first, last), result) if result else None


def mean_spectrum(spectra: list[list[float]], points: int = 100) -> tuple[list[float], list[float]]:
    """Return the geometric mean of spectra of several lengths, at evenly spaced shares of them."""
    shares = [i / (points - 1) for i in range(points)]
    logs = [[math.log(max(s[round(x * (len(s) - 1))], 1e-8)) for x in shares] for s in spectra]
    return shares, [math.exp(fmean(column)) for column in zip(*logs, strict=True)]


class _Weights:
    """The tensors of a checkpoint, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, Path] = {}
        from safetensors import SafetensorError, safe_open

        for file in _files(folder):
            try:
                with safe_open(file, "pt") as held:
                    self.files |= dict.fromkeys(held.keys(), file)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{file.parent.name}/{file.name} cannot be read ({error})") from None

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.files[name], "pt") as held:
            tensor: Tensor = held.get_tensor(name)
            return tensor


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names: dict[str, Any] = json.loads(index.read_text())["weight_map"]
            return sorted({folder / name for name in names.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []
    return [file for file in (folder / "model.safetensors",) if file.exists()]


def _targets(run: Run, old: _Weights, new: _Weights) -> list[str]:
    """Return the matrices that the run projected; of another optimizer all matrices of a known type."""
    groups = run.described.get("groups", ())
    ours = [name for group in groups if "rank" in group for name in group.get("param_names") or ()]
    both = old.files.keys() & new.files.keys()
    names = [name for name in ours if name in both]
    return names or sorted(name for name in both if module_type(name) != "other")


def _some(names: list[str], matrices: int) -> list[str]:
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[module_type(name)].append(name)
    chosen = []
    for members in kinds.values():
        count = min(matrices, len(members))
        chosen += [members[round(i * (len(members) - 1) / max(1, count - 1))] for i in range(count)]
    return chosen


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.float().reshape(-1, tensor.shape[-1]) if tensor.dim() != 2 else tensor.float()
