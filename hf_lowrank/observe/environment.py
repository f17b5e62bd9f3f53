"""What a report of a problem needs: versions, devices, and how a run was set up. Transformers is not imported."""

from __future__ import annotations

import json
import platform
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import hf_lowrank
from hf_lowrank.modules import kind_of
from hf_lowrank.observe.records import RUN_FILE


PACKAGES = ("transformers", "accelerate", "peft", "bitsandbytes", "datasets")


def versions() -> dict[str, str]:
    """Return the versions of this package, of Python, torch and what else matters, "-" for what is not installed."""
    import torch

    found = {
        "hf_lowrank": hf_lowrank.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "-"
    return found


def devices() -> list[str]:
    """Return what torch could train on: the CPU with the number of its threads, then every accelerator."""
    import torch

    found = [f"cpu, {torch.get_num_threads()} threads"]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    for i in range(torch.accelerator.device_count() if accelerator else 0):
        name = f", {torch.cuda.get_device_name(i)}" if accelerator and accelerator.type == "cuda" else ""
        found.append(f"{accelerator}:{i}{name}")
    return found


def environment() -> dict[str, Any]:
    """Return versions, platform and devices."""
    return {"versions": versions(), "platform": platform.platform(), "devices": devices()}


def run(folder: Path) -> dict[str, Any]:
    """Return how a run was set up, from its output folder: the method, its options, and the shapes of its weights.

    The options are those of the matrices, else of all parameters; "-" stands for a shape that an older run left out.

    Raises:
        ValueError: if the folder is of no run with these optimizers, or its file is damaged.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {RUN_FILE}: it is not the output folder of a run with these optimizers")
    try:
        written = json.loads(file.read_text())
        groups = written["groups"]
        shapes = written.get("shapes") or [[]] * len(groups)
        main = next((group for group in groups if "rank" in group), groups[0])
        return {"method": written["optimizer"], "options": _options(main), "parameters": _parameters(groups, shapes)}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {type(error).__name__}: {error}") from None


def _options(group: dict[str, Any]) -> dict[str, Any]:
    left_out = ("param_names", "method", "format", "initial_lr")
    return {key: value for key, value in group.items() if key not in left_out}


def _parameters(groups: list[dict[str, Any]], shapes: list[list[list[int]]]) -> list[dict[str, Any]]:
    """Return a row for parameters of the same name (numbers of layers aside), shape and group."""
    counted: Counter[tuple[str, str, Any]] = Counter()
    for group, sizes in zip(groups, shapes, strict=True):
        names: list[str] = group.get("param_names") or ["-"] * len(sizes)
        for name, shape in zip(names, sizes or [[]] * len(names), strict=True):
            counted[kind_of(name), " x ".join(map(str, shape)) or "-", group.get("rank")] += 1
    return [
        {"name": name, "number": number, "shape": shape, "rank": rank}
        for (name, shape, rank), number in counted.items()
    ]
