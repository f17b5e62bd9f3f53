"""What the parameters of a model are, by its modules. Needs neither transformers nor peft to know their models."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator

from torch import Tensor, nn


HEADS = ("lm_head", "classifier", "score", "head")
"""Modules that are output heads, which stay dense by default."""

LORA = re.compile(r"(^|\.)lora_")
"""Names of LoRA factors."""

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch.compile, activation checkpointing and FSDP1 call what they wrap; DDP and others call it `module`."""


def trainable(model: nn.Module, *, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield (name without wrappers, parameter) of every parameter that requires a gradient, shared ones once.

    Args:
        model: the model.
        frozen: also those that do not.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"parameters are split by their names in a model: give the nn.Module, not {type(model).__name__}"
        )
    clean = cleaner(model)
    for name, p in model.named_parameters():
        if p.requires_grad or frozen:
            yield clean(name), p


def wrapped(module: nn.Module) -> str | None:
    """Return the name of what a wrapper wraps; `module` is that where there are no parameters beside it."""
    if found := next((name for name in _WRAPPED if name in module._modules), None):
        return found
    if module._modules.get("module") is None:
        return None
    beside = [one for name, one in module._modules.items() if name != "module" and one is not None]
    own = [p for p in module._parameters.values() if p is not None]
    return None if own or any(True for one in beside for _ in one.parameters()) else "module"


def cleaner(model: nn.Module) -> Callable[[str], str]:
    """Return what strips from a name in a model what torch.compile, DDP and activation checkpointing add to it."""
    inside = {f"{prefix}.{name}".lstrip(".") for prefix, one in model.named_modules() if (name := wrapped(one))}

    def clean(name: str) -> str:
        parts = name.split(".")
        return ".".join(part for i, part in enumerate(parts) if ".".join(parts[: i + 1]) not in inside)

    return clean if inside else str


def kind_of(name: str) -> str:
    """Return the name of a parameter's module with `*` for the numbers of layers."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removesuffix(".weight"))


def kinds(model: nn.Module) -> dict[int, str]:
    """Return by its id what a parameter is: an embedding, also if a head shares it, a head's weight, or a vector."""
    vectors = {id(p): "vector" for p in model.parameters() if p.dim() < 2}
    inside = {id(p) for p in body(model).parameters()}
    heads = {id(p): "head" for path, p in matrices(model) if p.dim() == 2 and is_head(path, p, inside)}
    return {**vectors, **heads, **dict.fromkeys(embeddings(model), "embedding")}


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name of the module, weight) of every weight that could be projected."""
    tables, clean = embeddings(model), cleaner(model)
    for prefix, module in model.named_modules():
        path = clean(prefix)
        experts = "expert" in f"{path}.{type(module).__name__}".lower()
        for name, p in module.named_parameters(recurse=False):
            linear = name == "weight" and p.dim() == 2 and is_linear(module)
            stacked = experts and p.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            if (linear or stacked) and id(p) not in tables and not LORA.search(path):
                yield path if linear else f"{path}.{name}", p


def embeddings(model: nn.Module) -> set[int]:
    """Return the ids of the weights of all nn.Embedding."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def tied(model: nn.Module) -> bool:
    """Tell whether a linear layer, such as the head, has the weight of an embedding."""
    tables = embeddings(model)
    return any(is_linear(module) and id(module.weight) in tables for module in model.modules())


def is_head(path: str, p: Tensor, inside: Collection[int]) -> bool:
    """Tell whether a weight is that of an output head.

    Args:
        path: name of its module.
        p: the weight.
        inside: ids of all parameters of the model's body.
    """
    return id(p) not in inside or path.split(".")[-1] in HEADS


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module multiplies by its weight."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # transformers' own, as GPT-2 has it


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model's body: the items of its lists (nn.ModuleList) of which each holds a matrix.

    A list in a list, such as the experts of a layer, is a part of that; layers of an encoder come before a decoder's.
    """
    found: list[nn.Module] = []
    lists: list[str] = []
    for name, module in body(model).named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            items = list(module)
            if all(any(True for _ in matrices(item)) for item in items):
                found += items
    return found


def new_heads(model: nn.Module) -> set[int]:
    """Return the ids of the parameters outside the body of a model that is no language model: those of a new head."""
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return set()
    inside = {id(p) for p in body(model).parameters()}
    return {id(p) for p in model.parameters() if id(p) not in inside}


def body(model: nn.Module) -> nn.Module:
    """Return the model without its head: `base_model` of a PreTrainedModel, below any wrapper."""
    while name := wrapped(model):
        model = model.get_submodule(name)
    if callable(get_base := getattr(model, "get_base_model", None)):  # peft
        model = get_base()
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model
