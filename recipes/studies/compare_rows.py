"""What compare_methods.py compares: its rows, the points they are trained at, and the rule that chooses the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from hf_lowrank import METHODS
from hf_lowrank.methods.dense import KINDS, MIXED
from hf_lowrank.methods.moments.adam import Adam
from hf_lowrank.methods.resolve import Config, split


LONG_MEMORY = ((0.9, 0.9), (0.9, 0.99), (0.9, 0.999))
MOMENTUM = ((0.8, 0.95), (0.9, 0.95), (0.95, 0.95))
"""Decays (b1, b2) of the moments of matrices that are tried: b2 where it matters, b1 for orthogonalised momentum."""

FIXED = {"dense": "adam", "embedding_rule": "adam", "head_rule": "adam", "dense_state_format": "fp32"}
"""Options of every row: embeddings, head and norms are AdamW's, in fp32, whatever a method has for them."""

LORA = "lora"
"""The method that is no name of hf_lowrank: peft's adapters on frozen matrices."""


@dataclass(frozen=True)
class Row:
    """A line of the tables.

    Attributes:
        name: what it is called.
        method: a name of hf_lowrank, or LORA.
        options: its options; a rank that is not among them is a quarter of the width, if it has one.
        betas: the decays of moments that are tried.
        unit: the learning rate of matrices is rate / unit. Default: the method's scale.
        fixed: whether embeddings, head and norms are as FIXED says; else as the method has them.
        origin: name of the row that this one was made from, where a search begins that starts from another study: the
            same in another format, with another rank, with other embeddings and head.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    betas: tuple[tuple[float, float], ...] = LONG_MEMORY
    unit: float | None = None
    fixed: bool = True
    origin: str = ""

    @property
    def ranked(self) -> bool:
        """Whether it has a rank to choose: not APOLLO-Mini, whose rank is 1, nor FOAM, whose level says it."""
        return "rank" not in self.defaults

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What its line in the package's table sets."""
        return {} if self.method == LORA else METHODS[split(self.method)[0]].defaults

    @property
    def own(self) -> Row | None:
        """The row with embeddings, head and norms as the method has them; None where that is the same."""
        if self.method == LORA:
            return None
        config = Config.of(self.method, self.options, model=True)
        dense = [config.dense(kind) for kind in (MIXED, *KINDS)]
        if all(isinstance(d.dense_rule, Adam) and d.options["dense_state_format"] == "fp32" for d in dense):
            return None
        return replace(self, name=f"{self.name}, own dense", fixed=False, origin=self.name)


def _muon(name: str, method: str, origin: str = "", **options: Any) -> Row:
    return Row(name, method, options, MOMENTUM, origin=origin)


ROWS = {
    row.name: row
    for row in (
        Row("full_adamw", "full_adamw"),
        Row("full_adamw_8bit", "full_adamw_8bit", origin="full_adamw"),
        _muon("full_muon", "full_muon"),
        _muon("full_muon_8bit", "full_muon", "full_muon", state_format="8bit"),
        _muon("muon_4bit", "muon_4bit", "full_muon"),
        _muon("full_normuon", "full_normuon"),
        _muon("rmnp", "rmnp"),
        Row("scale_sgd", "scale_sgd", betas=((0.9, 0.999),)),
        Row("racs", "racs", betas=MOMENTUM),
        Row("galore_dominant_adamw", "galore_dominant_adamw"),
        Row("galore_i3s_adamw", "galore_i3s_adamw"),
        Row("fira_adamw", "fira_adamw"),
        Row("fira_i3s_adamw", "fira_i3s_adamw"),
        Row("subtrack_pp_adamw", "subtrack_pp_adamw"),
        Row("ldadam", "ldadam"),
        Row("golore_adamw", "golore_adamw"),
        Row("apollo_random_adamw", "apollo_random_adamw"),
        Row("apollo_mini_adamw", "apollo_mini_adamw", unit=1.0),
        Row("foam_adamw", "foam_adamw"),
        Row("alice_adamw", "alice_adamw"),
        Row(
            "i3s_compensation",
            "lowrank",
            {"subspace": "i3s", "moments": "adam", "reconstruction": "compensation", "scale": 0.3},
        ),
        _muon("galore_dominant_muon", "galore_dominant_muon"),
        _muon("sumo", "sumo"),
        Row("frugal_adamw", "frugal_adamw"),
        Row("frugal_adamw_4bit", "frugal_adamw", {"state_format": "4bit"}, origin="frugal_adamw"),
        Row(LORA, LORA),
    )
}
"""The lines of the table. APOLLO multiplies by the root of its scale; Mini's, 128, makes its step as long as Adam's at
width 128, so its unit is 1."""


def other_formats(row: Row) -> tuple[Row, ...]:
    """Return the rows that are the same with state in another format, which are compared with this one."""
    return tuple(one for one in ROWS.values() if one.origin == row.name)


def beside(row: Row, best: Point, formats: Iterable[Point | None]) -> Iterator[Point]:
    """Yield the points at which a row is tried beside its search.

    What others are compared with is to be tuned no less than they: a row is tried at the best points of the same in
    other formats, and BASELINE where one rate is a step above its best and the other a step below.

    Args:
        row: the row.
        best: its best point.
        formats: the best points of the same in other formats, of those that have been searched.
    """
    yield from (point for point in formats if point)
    if row.name == BASELINE:
        yield from (best._replace(matrices=best.matrices + i, others=best.others - i) for i in (1, -1))


BASELINE = "full_adamw"
"""What every row is compared with."""


class Point(NamedTuple):
    """Where a row is trained: steps on a lattice from its middle, (0, 0, 0, 0).

    Attributes:
        matrices: rate of the matrices, 4e-3 x 2^i.
        others: rate of embeddings, head and norms, 1e-2 x 2^i.
        betas: 0 is the row's middle decay of moments.
        decay: weight decay of the matrices: 0, then 0.025 x 4^i. Each step multiplies by 1 - rate x decay.
    """

    matrices: int = 0
    others: int = 0
    betas: int = 0
    decay: int = 0

    def values(self, row: Row) -> dict[str, Any]:
        """Return what the point means for a row."""
        return {
            "matrix_rate": 4e-3 * 2.0**self.matrices,
            "other_rate": 1e-2 * 2.0**self.others,
            "betas": list(row.betas[len(row.betas) // 2 + self.betas]),
            "decay": 0.025 * 4.0**self.decay if self.decay else 0.0,
        }

    def neighbours(self, row: Row) -> Iterator[Point]:
        """Yield the points that differ by one step of one axis, as far as the axes go."""
        for axis in range(len(self)):
            for step in (1, -1):
                near = self._replace(**{self._fields[axis]: self[axis] + step})
                if abs(near.betas) <= len(row.betas) // 2 and near.decay >= 0:
                    yield near


START = Point(others=2)
"""Where a search begins that starts at no other study's best: the rate of embeddings, head and norms is that at which
the first searches ended (AdamW, 8-bit AdamW and Muon, from the middle)."""


def next_trial(losses: Mapping[Point, float], row: Row, *, start: Point, trials: int, most: int) -> Point | None:
    """Return the point that a search tries next, or None where it is over: the same rule for every row.

    After the start it is the first neighbour that has not been tried of the best point that has one. So every row
    gets `trials` trials, and no axis an edge before. Then the search goes on while the best of all lies at an edge of
    what has been tried (it has a neighbour that has not), up to `most`.

    Args:
        losses: what has been tried, and the loss on the tuning text; of a run that diverged, inf.
        row: whose search it is.
        start: the first point.
        trials: trials of every row.
        most: trials of a row whose best stays at an edge.
    """
    if len(losses) >= most:
        return None
    if start not in losses:
        return start
    ranked = sorted(losses, key=losses.__getitem__)
    open_ones = ranked if len(losses) < trials else ranked[:1]
    return next((near for point in open_ones for near in point.neighbours(row) if near not in losses), None)


def settled(losses: Mapping[Point, float], row: Row) -> bool:
    """Tell whether the best of all that has been tried lies at no edge: all its neighbours have been tried too."""
    best = min(losses, key=losses.__getitem__)
    return all(near in losses for near in best.neighbours(row))
