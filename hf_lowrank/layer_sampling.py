"""Which layers of a model train now: BAdam, LISA and OwLore, as functions of the seed and the step.

Legend: D layers · k = sampled_layers of them train at once · K = switch_every steps are an interval, i its number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from hf_lowrank import modules
from hf_lowrank.methods import options as opt
from hf_lowrank.methods.suggestions import nearest
from hf_lowrank.tensors import random


OPTION = "layer_sampling"
"""The option that names a rule."""

MISSPELT = 0.9
"""Likeness from which on another word is taken for one of these options (methods.suggestions)."""

_EVERY = "steps of the optimizer until other layers are trained"
_LAYERS = "layers that are trained at once"
_OUTSIDE = "train what is in no layer too: embeddings, output head, last norm; a new head is trained in any case"


@dataclass(frozen=True)
class Rule(ABC):
    """How the layers of an interval are chosen; the fields are its options.

    Attributes:
        restarts: whether the state of a layer that stays in training is dropped as well.
        by_outliers: whether a choice needs the layers' shares of outliers.
    """

    restarts: ClassVar[bool] = False
    by_outliers: ClassVar[bool] = False

    switch_every: int
    sampled_layers: int
    train_outside: bool

    @property
    def name(self) -> str:
        """What it is called in RULES."""
        return type(self).__name__.lower()

    @abstractmethod
    def choose(self, count: int, interval: int, seed: int, shares: Sequence[float]) -> list[int]:
        """Return the layers of an interval, ascending.

        Args:
            count: D, at least k.
            interval: i = step // K.
            seed: of the run: the same on all processes, and after a resume.
            shares: of every layer the share of its outliers, where `by_outliers`.
        """

    @abstractmethod
    def costliest(self, sizes: Sequence[int]) -> list[int]:
        """Return the layers of that choice whose sizes have the largest sum."""


@dataclass(frozen=True)
class BAdam(Rule):
    """One block of k adjacent layers after the other, K steps each; every D / k intervals each has had its turn.

    In a random order, which is drawn anew for each round (the default), or in that of the layers. Embeddings, output
    head and last norm do not train by default.

    References:
        BAdam, arXiv 2404.02827, Algorithm 1.

    Differs from the authors' code: there the first block has K - 1 steps, and the place in the order is not saved, so
    that a resumed run starts over with the first block. Weights of bf16 have fp32 copies there while they train; here
    optimizers of ours round stochastically, and others write bf16 as they always do. A classification head, which is
    new, always trains here. Weight decay is that of each parameter's group.
    """

    restarts: ClassVar[bool] = True

    switch_every: int = opt.integer(50, minimum=1, help=_EVERY)
    sampled_layers: int = opt.integer(1, minimum=1, help=_LAYERS)
    train_outside: bool = opt.flag(False, help=_OUTSIDE)
    layer_order: str = opt.choice("random", "ascending", "descending", help="order of the blocks")

    @override
    def choose(self, count: int, interval: int, seed: int, shares: Sequence[float]) -> list[int]:
        blocks = self._blocks(count)
        turn, place = divmod(interval, len(blocks))
        order = list(range(len(blocks)))
        if self.layer_order == "random":
            generator = random.generator(random.Stream.LAYERS, seed, turn)
            order = torch.randperm(len(blocks), generator=generator, device="cpu").tolist()
        return blocks[order[-1 - place if self.layer_order == "descending" else place]]

    @override
    def costliest(self, sizes: Sequence[int]) -> list[int]:
        return max(self._blocks(len(sizes)), key=lambda block: sum(sizes[i] for i in block))

    def _blocks(self, count: int) -> list[list[int]]:
        starts = range(0, count, self.sampled_layers)
        return [list(range(start, min(start + self.sampled_layers, count))) for start in starts]


@dataclass(frozen=True)
class LISA(Rule):
    """k layers drawn uniformly without replacement for every interval; what is in no layer trains always.

    References:
        LISA, arXiv 2403.17919, Algorithm 1.

    Differs from the authors' code: there the states of layers that train no longer are kept, so that memory grows to
    that of full training, and layers are drawn from numpy's global generator, differently on each process and after a
    resume. A layer that is drawn twice in a row keeps its state here, as there.
    """

    switch_every: int = opt.integer(20, minimum=1, help=_EVERY)
    sampled_layers: int = opt.integer(2, minimum=1, help=_LAYERS)
    train_outside: bool = opt.flag(True, help=_OUTSIDE)

    @override
    def choose(self, count: int, interval: int, seed: int, shares: Sequence[float]) -> list[int]:
        return _drawn([1.0] * count, self.sampled_layers, seed, interval)

    @override
    def costliest(self, sizes: Sequence[int]) -> list[int]:
        return _largest(sizes, self.sampled_layers)


@dataclass(frozen=True)
class OwLore(Rule):
    """k layers drawn without replacement, with probability proportional to their shares of outliers.

    The share of a layer: of all entries A_ij = |W_ij| ||X_j|| of its matrices, X_j an input over the calibration
    batches, those above `outlier_threshold` times their mean. It is measured once, before the first step. The paper
    trains the layers by GaLore: choose galore_dominant_adamw with scale=1.

    References:
        OwLore, arXiv 2405.18380; the share of outliers: OWL, arXiv 2310.05175.

    Differs from the authors' code: there the shares are read from a file that was made for LLaMA-2 7B, whatever the
    model; the states of layers that train no longer are kept, and layers are drawn from numpy's global generator.
    """

    by_outliers: ClassVar[bool] = True

    switch_every: int = opt.integer(50, minimum=1, help=_EVERY)
    sampled_layers: int = opt.integer(5, minimum=1, help=_LAYERS)
    train_outside: bool = opt.flag(True, help=_OUTSIDE)
    outlier_threshold: float = opt.number(13.0, above=0.0, help="times the mean above which an entry is an outlier")
    calibration_batches: int = opt.integer(4, minimum=1, help="training batches with which outliers are measured")

    @override
    def choose(self, count: int, interval: int, seed: int, shares: Sequence[float]) -> list[int]:
        return _drawn(shares, self.sampled_layers, seed, interval)

    @override
    def costliest(self, sizes: Sequence[int]) -> list[int]:
        return _largest(sizes, self.sampled_layers)


RULES: Mapping[str, type[Rule]] = {"badam": BAdam, "lisa": LISA, "owlore": OwLore}
"""The rules by name."""


def _drawn(weights: Sequence[float], k: int, seed: int, interval: int) -> list[int]:
    generator = random.generator(random.Stream.LAYERS, seed, interval)
    chances = torch.tensor(weights, dtype=torch.float64, device="cpu")
    drawn: list[int] = random.gumbel_top_r(chances, k, generator).tolist()
    return drawn


def _largest(sizes: Sequence[int], k: int) -> list[int]:
    return sorted(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:k])


def rule_of(name: str, given: Mapping[str, Any]) -> Rule:
    """Return a rule with its options, as values or text.

    Raises:
        ValueError: for a rule or an option that does not exist, and for a value that is not valid.
    """
    if name not in RULES:
        raise ValueError(f"{OPTION} must be one of {', '.join(RULES)}, got {name!r}{opt.suggest(str(name), RULES)}")
    schema = opt.schema(RULES[name])
    return RULES[name](**{key: opt.parse(key, given[key], schema, what=f"{OPTION}={name}") for key in given})


def take(options: MutableMapping[str, Any]) -> Rule | None:
    """Take what is layer sampling's out of the options of an optimizer; return the rule that they ask for, if any.

    Raises:
        ValueError: as `rule_of`, and for its options without a rule.
    """
    own = {item.name for rule in RULES.values() for item in fields(rule)}
    given = {key: options.pop(key) for key in [*options] if key in own}
    name = options.pop(OPTION, None)
    for key in options:  # beside another optimizer nobody else would say so
        meant, near = nearest(key, [*own, OPTION])
        if near >= MISSPELT:
            raise ValueError(f"optim_args: there is no option {key!r}; did you mean {meant!r}?")
    if name is not None:
        return rule_of(name, given)
    if given:
        raise ValueError(f"{', '.join(given)}: for layer sampling only; add {OPTION}={', '.join(RULES)}")
    return None


class Layers:
    """The parameters of a model that an optimizer trains, by the layers in which they are.

    Args:
        model: the model.
        params: what is trained; what is not among them stays frozen.
        rule: how layers are chosen.

    Raises:
        ValueError: for a model without a list of layers, or with fewer than are to be trained at once.
    """

    def __init__(self, model: nn.Module, params: Iterable[Tensor], rule: Rule) -> None:
        self.rule = rule
        self.params = list(dict.fromkeys(params))
        trained = set(self.params)
        found = [(layer, [p for p in layer.parameters() if p in trained]) for layer in modules.layers(model)]
        self.modules = [layer for layer, members in found if members]
        self.members = [members for _, members in found if members]
        name = type(model).__name__
        if not self.members:
            raise ValueError(
                f"{OPTION} trains some layers of a list at a time, and {name} has no nn.ModuleList of layers with "
                f"weights that train: leave {OPTION} out"
            )
        if rule.sampled_layers > len(self.members):
            raise ValueError(f"sampled_layers={rule.sampled_layers}: {name} has {len(self.members)} layers that train")
        self.inside = {p for members in self.members for p in members}
        outside = [p for p in self.params if p not in self.inside]
        new = modules.new_heads(model)
        self.always = [p for p in outside if rule.train_outside or id(p) in new]

    def chosen(self, step: int, seed: int, shares: Sequence[float] = ()) -> list[int]:
        """Return the layers that train at a step of the optimizer, the first of which is 0: see `Rule.choose`."""
        return self.rule.choose(len(self.members), step // self.rule.switch_every, seed, shares)

    def costliest(self) -> list[int]:
        """Return the layers of the choice with the most bytes of weights."""
        return self.rule.costliest([sum(p.numel() * p.element_size() for p in members) for members in self.members])

    def require_(self, layers: Collection[int]) -> list[Tensor]:
        """Have some layers, and what always trains, require a gradient and nothing else; return what does not now."""
        awake = {*self.always, *(p for i in layers for p in self.members[i])}
        asleep = [p for p in self.params if p not in awake]
        for p in self.params:
            p.requires_grad_(p in awake)
        for p in asleep:
            p.grad = None
        return asleep

    def wake_(self) -> None:
        """Have all that is trained require a gradient."""
        for p in self.params:
            p.requires_grad_(True)


@contextmanager
def at_most(model: nn.Module, params: Iterable[Tensor], rule: Rule | None) -> Iterator[None]:
    """Have what trains at once require a gradient and nothing else: of all choices that of the most bytes of weights.

    Args:
        model, params: see `Layers`.
        rule: how layers are chosen; None changes nothing.
    """
    if rule is None:
        yield
        return
    layers = Layers(model, params, rule)
    layers.require_(layers.costliest())
    try:
        yield
    finally:
        layers.wake_()
