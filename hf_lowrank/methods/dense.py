"""Options of the parameters that have no subspace: rates and rules by kind. Reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields

from hf_lowrank.methods import options as opt


KINDS = ("embedding", "head", "vector")
"""Kinds of dense parameters: weights of nn.Embedding, matrices of output heads, anything with fewer than two axes."""

MIXED = "mixed"
"""The kind of a group whose parameters are of several kinds, or of no other."""

SAME = "same"
"""The rule that a method's own moments say (`Moments.dense`)."""

RULES = (SAME, "adam", "momentum", "momentum_column_norm", "column_norm", "sgd")
"""Rules of dense parameters: moments by name, or SAME."""

OF_VECTORS = {"column_norm": "adam", "momentum_column_norm": "adam"}
"""What takes the place of rules that need a second axis."""

RULE = opt.choice(*RULES, help="rule of the parameters that have no subspace; same: what the method has for them")


@dataclass(frozen=True)
class DenseOptions:
    """Options of a group of dense parameters."""

    dense: str = opt.again(RULE)
    kind: str = opt.choice(MIXED, *KINDS, help="what the parameters are")
    in_hook: bool | str = opt.switch(
        "auto",
        help="whether the layerwise mode steps them as soon as there is a gradient; auto: as the row's matrices",
    )


@dataclass(frozen=True)
class SplitOptions:
    """Options of the split of a model into groups, not of a step: which dense parameters differ from the others."""

    dense: str = opt.again(RULE)
    embedding_rule: str | None = opt.choice(*RULES, derived=True, help="the same of embeddings alone; -: as dense")
    head_rule: str | None = opt.choice(*RULES, derived=True, help="the same of output heads alone; -: as dense")
    embedding_lr: float | None = opt.number(None, help="peak learning rate of embeddings; -: learning_rate")
    head_lr: float | None = opt.number(None, help="peak learning rate of output heads; -: learning_rate")
    vector_lr: float | None = opt.number(None, help="peak learning rate of vectors (biases, norms); -: learning_rate")

    def rule(self, kind: str) -> str:
        """Return the rule of a kind of parameters."""
        chosen: str = getattr(self, f"{kind}_rule", None) or self.dense
        return OF_VECTORS.get(chosen, chosen) if kind == "vector" else chosen

    def rate(self, kind: str) -> float | None:
        """Return the peak learning rate of a kind of parameters, or None for that of all others."""
        rate: float | None = getattr(self, f"{kind}_lr", None)
        return rate

    @property
    def apart(self) -> list[str]:
        """The kinds that have groups of their own: none where nothing differs."""
        usual = (None, SAME, SAME)
        return [kind for kind in KINDS if (self.rate(kind), self.rule(kind), self.dense) != usual]

    def given(self, kind: str) -> list[str]:
        """Return the options that were set for one kind alone."""
        return [
            item.name
            for item in fields(self)
            if item.name.startswith(f"{kind}_") and getattr(self, item.name) is not None
        ]
