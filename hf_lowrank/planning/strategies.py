"""How a training run is spread over processes: what each of them holds, and what it sends in a step.

Counted for the process that holds most; `traffic` has the collectives.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from hf_lowrank.engine import refusals
from hf_lowrank.engine.matrix import reduces
from hf_lowrank.engine.plan import Plan, projected_bytes
from hf_lowrank.engine.schedule import owners
from hf_lowrank.engine.work import Declared
from hf_lowrank.observe.counting import Size, weight_bytes
from hf_lowrank.planning.traffic import (
    Split,
    Tokens,
    Traffic,
    basis_bytes,
    exchanged,
    gap_of,
    layers_of,
    passed,
    reduced,
    refreshed,
)


class Strategy(ABC):
    """What all strategies tell.

    Attributes:
        gpus: how many processes there are, of one device each.
    """

    gpus: int

    @property
    @abstractmethod
    def name(self) -> str:
        """One of NAMES, or "" for one process."""

    def split(self, name: str, p: Tensor) -> Split | None:
        """Return how a parameter and its gradient are split, or None."""
        return None

    def kept(self, declared: Sequence[Declared]) -> Iterable[Declared]:
        """Return those whose state the process keeps that keeps most."""
        return declared

    def gathered(self, net: nn.Module, declared: Sequence[Declared], size: Size) -> int:
        """Return what the strategy itself holds: buckets of gradients, or gathered layers."""
        return 0

    def traffic(self, net: nn.Module, declared: Sequence[Declared], size: Size, tokens: Tokens) -> Traffic:
        """Return what one process sends in a step, of a model's parameters and those that are trained."""
        return Traffic()

    def refusal(self, declared: Iterable[Declared]) -> str:
        """Return why training does not run so, and the way out, or "": by default as the parameters are cut."""
        return _first(_of_cut(self, one) for one in declared)

    # ---- of any -----------------------------------------------------------------------------------------------------

    def piece(self, name: str, p: Tensor) -> Tensor:
        """Return the largest piece of a parameter that a process holds, on the meta device."""
        shape, split = [*p.shape], self.split(name, p)
        if split is not None:
            shape[split.axis] = ceil(shape[split.axis] / split.processes)
        return torch.empty(shape, dtype=p.dtype, device="meta", requires_grad=p.requires_grad)

    def pieces(self, declared: Iterable[Declared]) -> list[Declared]:
        """Return what is known of the largest pieces."""
        found = []
        for name, p, config, plan in declared:
            split = self.split(name, p)
            if split is not None:
                plan = Plan.of(p, config, name, split=split)
            found.append(Declared(name, self.piece(name, p), config, plan))
        return found

    def held(self, net: nn.Module, size: Size) -> int:
        """Return the bytes of one process's pieces of all parameters."""
        return weight_bytes([self.piece(name, p) for name, p in net.named_parameters()], size)

    @property
    def activation_pieces(self) -> int:
        """Into how many pieces the activations inside of attention and feed-forward are split."""
        return 1


@dataclass(frozen=True)
class Alone(Strategy):
    """One process, which holds all and sends nothing."""

    gpus: int = 1

    @property
    @override
    def name(self) -> str:
        return ""


@dataclass(frozen=True)
class Replicated(Strategy):
    """DistributedDataParallel: every process holds all; refreshes are shared out.

    Gradients are all-reduced, or what is projected of them (`reduce_projected`, layerwise).
    """

    gpus: int

    @property
    @override
    def name(self) -> str:
        return "ddp"

    @override
    def gathered(self, net: nn.Module, declared: Sequence[Declared], size: Size) -> int:
        """DDP copies gradients into buckets, of the same size."""
        return self._reduced(declared, size)

    @override
    def traffic(self, net: nn.Module, declared: Sequence[Declared], size: Size, tokens: Tokens) -> Traffic:
        matrices = [one for one in declared if one.config.low_rank]
        refresh = sum(basis_bytes(one.plan) / gap_of(one) for one in matrices)
        own = [one for one in matrices if reduces(one.config)]
        step = reduced(sum(projected_bytes(one.plan, one.config) for one in own), self.gpus)
        refresh += sum(reduced(weight_bytes([one.weight], size), self.gpus) / gap_of(one) for one in own)
        return Traffic(gradients=reduced(self._reduced(declared, size), self.gpus), step=step, refresh=refresh)

    @override
    def refusal(self, declared: Iterable[Declared]) -> str:
        return _first(refusals.of_replicas(one.config) for one in declared)

    def _reduced(self, declared: Sequence[Declared], size: Size) -> int:
        """Return the bytes of the gradients that DDP adds up."""
        return weight_bytes([one.weight for one in declared if not reduces(one.config)], size)


@dataclass(frozen=True)
class Owned(Replicated):
    """DistributedDataParallel where every parameter has an owner that keeps its state (`shard_state`)."""

    @property
    @override
    def name(self) -> str:
        return "ddp_sharded"

    @override
    def kept(self, declared: Sequence[Declared]) -> Iterable[Declared]:
        owner = owners([one.nbytes for one in declared], self.gpus)
        shares = [[one for one, rank in zip(declared, owner, strict=True) if rank == i] for i in {*owner}]
        return max(shares, key=lambda share: sum(one.nbytes for one in share))

    @override
    def traffic(self, net: nn.Module, declared: Sequence[Declared], size: Size, tokens: Tokens) -> Traffic:
        """Owners send the weights in the place of bases."""
        weights = weight_bytes([one.weight for one in declared], size)
        return replace(super().traffic(net, declared, size, tokens), step=weights, refresh=0)

    @override
    def refusal(self, declared: Iterable[Declared]) -> str:
        return _first(refusals.of_owners(one.config.options) for one in declared)


@dataclass(frozen=True)
class Sharded(Strategy):
    """FSDP2: the first axis of every parameter is split over `shards` processes, and copied to others (HSDP).

    Attributes:
        shards: processes over which one copy of the model is split.
    """

    gpus: int
    shards: int

    @property
    @override
    def name(self) -> str:
        return "fsdp2" if self.shards == self.gpus else "hsdp"

    @override
    def split(self, name: str, p: Tensor) -> Split | None:
        return Split(0, self.shards)

    @override
    def gathered(self, net: nn.Module, declared: Sequence[Declared], size: Size) -> int:
        """The root's parameters stay gathered; of the layers one is in use, the next one on its way, and one's
        gradient whole."""
        inside, rest = layers_of(net)
        layers, root = [weight_bytes(some, size) for some in inside], weight_bytes(rest, size)
        return root + 3 * max(layers, default=0)

    @override
    def traffic(self, net: nn.Module, declared: Sequence[Declared], size: Size, tokens: Tokens) -> Traffic:
        inside, rest = layers_of(net)
        layers, root = [weight_bytes(some, size) for some in inside], weight_bytes(rest, size)
        trained = weight_bytes([one.weight for one in declared], size)
        copies = self.gpus // self.shards
        return Traffic(
            weights=passed(root + 2 * sum(layers), self.shards),  # layers once more for the backward pass
            gradients=passed(trained, self.shards) + reduced(trained / self.shards, copies),
            step=sum(exchanged(one, self.split(one.name, one.weight)) for one in declared),
            refresh=sum(refreshed(one, self.split(one.name, one.weight), size, copies) for one in declared),
        )


@dataclass(frozen=True)
class Tensors(Strategy):
    """Tensor parallel: matrices are split by the model's own plan (transformers' `base_model_tp_plan`).

    Attributes:
        plan: "colwise", "rowwise" or another word, by a parameter's module, `*` for numbers.
    """

    gpus: int
    plan: Mapping[str, str]
    AXES: ClassVar[Mapping[str, int]] = {
        "colwise": 0,
        "colwise_rep": 0,
        "colwise_gather_output": 0,
        "embedding_rowwise": 0,
        "rowwise": 1,
    }

    @property
    @override
    def name(self) -> str:
        return "tp"

    @override
    def split(self, name: str, p: Tensor) -> Split | None:
        module = re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0])
        axis = self.AXES.get(self.plan.get(module, ""))
        if axis is None or axis >= p.dim():
            return None
        return Split(axis, self.gpus)

    @override
    def traffic(self, net: nn.Module, declared: Sequence[Declared], size: Size, tokens: Tokens) -> Traffic:
        """Two all-reduces of a layer's width forward, two backward."""
        config = getattr(net, "config", None)
        width, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
        once = tokens.batch * tokens.seq * width * tokens.itemsize
        return Traffic(
            activations=4 * layers * reduced(once, self.gpus),
            step=sum(exchanged(one, self.split(one.name, one.weight)) for one in declared),
            refresh=sum(refreshed(one, self.split(one.name, one.weight), size) for one in declared),
        )

    @property
    @override
    def activation_pieces(self) -> int:
        return self.gpus


def _first(reasons: Iterable[str]) -> str:
    """Return the first reason that there is, or ""."""
    return next(filter(None, reasons), "")


def _of_cut(strategy: Strategy, one: Declared) -> str:
    """Return why a parameter does not train as a strategy cuts it, or ""."""
    split = strategy.split(one.name, one.weight)
    if split is None:
        return ""
    layout = Plan.of(one.weight, one.config, one.name, split=split).layout
    return refusals.of_shards(one.config) or refusals.of_shard(one.name, one.config, {split.axis}, layout)
