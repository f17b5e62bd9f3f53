"""Print the papers' memory columns beside a count of the same models, with the reason of every difference.

    python recipes/benchmarks/memory_tables.py

The papers estimate "weights and optimizer states in BF16": two bytes a number, one for an 8-bit code. So does this
count, of the models that their configuration files describe. G may be 10^9 or 2^30 bytes, so both are printed. A
figure agrees if it is one of them, rounded up or down; it lies between if it is above the one and below the other. The
papers do not print how they count; where a remark says "as if", it is our reading of the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from tables import Section, Target
from torch import nn

from hf_lowrank import METHODS, target_parameters
from hf_lowrank.hf.models import load_model
from hf_lowrank.planning.memory import estimate_memory


RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}
BENCHMARKED = ("60m", "130m", "350m", "1b")
EVERYTHING_8BIT = {"basis_format": "8bit"}

PUBLISHED = {
    "full rank": (0.36, 0.76, 2.06, 7.80),
    "GaLore": (0.24, 0.52, 1.22, 4.38),
    "low rank": (0.26, 0.54, 1.08, 3.57),
    "LoRA": (0.36, 0.80, 1.76, 6.17),
    "ReLoRA": (0.36, 0.80, 1.76, 6.17),
}
"""GB of weights and states at 60M, 130M, 350M, 1B: GaLore, arXiv 2403.03507, Table 2."""

ROBERTA = {
    ("full fine-tuning", 0): 747,
    ("GaLore", 4): 253,
    ("LoRA", 4): 257,
    ("GaLore", 8): 257,
    ("LoRA", 8): 264,
}
"""MB at RoBERTa-base: the same paper's Table 4."""


@dataclass(frozen=True)
class Row:
    """One figure of a paper beside the count, in bytes."""

    what: str
    paper: str
    count: float
    note: str

    @property
    def scaled(self) -> tuple[float, float]:
        """The count in 10^9 and 2^30 bytes, or 10^6 and 2^20."""
        return (
            (self.count / 1e6, self.count / 2**20)
            if self.paper.endswith("MB")
            else (self.count / 1e9, self.count / 2**30)
        )

    @property
    def verdict(self) -> str:
        """Whether the figure agrees."""
        number = self.paper.split(" ")[0]
        step, (large, small) = 10.0 ** -len(number.partition(".")[2]), self.scaled
        if any(abs(float(number) - x) < step for x in (large, small)):
            return "agrees"
        return "between" if small < float(number) < large else "differs"


@cache
def model(size: str) -> nn.Module:
    """Return a LLaMA, or RoBERTa-base with a classifier, on the meta device."""
    if size != "roberta-base":
        return load_model(size)
    from transformers import RobertaConfig, RobertaForSequenceClassification

    with torch.device("meta"):
        return RobertaForSequenceClassification(
            RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        )


def numbers(size: str, rank: int) -> dict[str, int]:
    """Count numbers: all weights, those of the projected matrices, their LoRA factors, and GaLore's states."""
    net = model(size)
    targets = set(target_parameters(net, rank=rank))
    shapes = [tuple(p.shape) for name, p in net.named_parameters() if name in targets]
    galore = estimate_memory(net, "galore_dominant_adamw", rank=rank, counting="bf16")
    return {
        "weights": galore.parameters,
        "matrices": sum(a * b for a, b in shapes),
        "factors": sum((a + b) * rank for a, b in shapes),
        "low-rank states": galore.low_rank_state // 2,
        "dense states": galore.dense_state // 2,
    }


def column(method: str, size: str, rank: int) -> int:
    """Return the bytes of weights and states: two for every number."""
    n = numbers(size, rank)
    rest = n["weights"] - n["matrices"]
    return (
        2
        * {
            "full rank": 3 * n["weights"],
            "GaLore": n["weights"] + n["low-rank states"] + n["dense states"],
            "low rank": 3 * (n["factors"] + rest),
            "LoRA": n["weights"] + 3 * n["factors"] + 2 * rest,
            "ReLoRA": n["weights"] + 3 * n["factors"] + 2 * rest,
        }[method]
    )


def pretraining() -> Iterator[Row]:
    """Yield GaLore's Table 2."""
    for method, figures in PUBLISHED.items():
        for size, figure in zip(("60m", "130m", "350m", "1b"), figures, strict=True):
            row = Row(f"{method}, {size.upper()}", f"{figure:.2f} GB", column(method, size, RANKS[size]), "")
            yield row if row.verdict == "agrees" else replace(row, note=_difference(method, size))


def _difference(method: str, size: str) -> str:
    n = numbers(size, RANKS[size])
    if method == "full rank" and size in ("60m", "1b"):
        named = {"60m": "60 M", "1b": "1.3 G"}[size]
        return (
            f"as if 6 bytes x {named}, the size that the model is called by; its file has {n['weights'] / 1e6:.1f} M"
        )
    if method == "full rank":
        return "as if with the tokenizer's 32,100 tokens; the file's 32,000 are counted"
    if method == "GaLore":
        least, most = (2 * (n["weights"] + n["low-rank states"] + x) / 2**30 for x in (0, n["dense states"]))
        return f"in 2^30 between {least:.2f}, without Adam's states of embeddings and head, and {most:.2f}, with them"
    if method == "low rank":
        return "which unit is not said"
    twice = 2 * n["weights"] + column("low rank", size, RANKS[size])
    return (
        f"as if the full weights were added to the low-rank row, with embeddings and head twice: "
        f"{twice / 1e9:.2f} in 10^9, {twice / 2**30:.2f} in 2^30"
    )


def seven_billion() -> Iterator[Row]:
    """Yield the parts that the paper gives for LLaMA 7B at rank 1024, 256 tokens at once."""
    n = numbers("7b", 1024)
    eight = estimate_memory(model("7b"), "galore_dominant_adamw_8bit", rank=1024, counting="bf16")
    weights = 2 * n["weights"]
    adam8 = 2 * n["weights"]  # two codes of one byte
    yield Row("7B weights (introduction)", "14 GB", weights, "rounded up")
    yield Row("7B weight gradients freed layer by layer (section 5.5)", "13.5 GB", weights, "")
    kept, recomputed = (
        estimate_memory("7b", "adamw_torch", seq=2048, checkpointing=x).activations for x in (False, True)
    )
    note = (
        "the paper multiplies the rounded 14 by 4 (weights, gradients, two moments) and adds 2; counted: 13.48 x 4 + 2"
    )
    yield Row("7B full rank, all of it (introduction)", "58 GB", 4 * weights + 2e9, note)
    note = f"no rule is given; ours: one sequence of 2048 tokens, with checkpointing {recomputed / 1e9:.1f} in 10^9"
    yield Row("7B activations (introduction)", "2 GB", kept, note)
    yield Row("7B 8-bit Adam, weights and states (Table 3)", "26 GB", weights + adam8, "rounded up")
    note = "rounded up; bases in bf16, moments in 8 bits"
    yield Row("7B 8-bit GaLore, weights and states (Table 3)", "18 GB", weights + eight.state, note)
    note = "measured there; counted: 8-bit Adam's states less 8-bit GaLore's with its bases in bf16"
    yield Row("7B states saved against 8-bit Adam (section 5.5)", "9.6 GB", adam8 - eight.state, note)
    layerwise = weights + eight.state + 2 * 4096 * 32000 * 2
    note = "measured there; counted: weights, states, gradients of embedding and head; activations come on top"
    yield Row("7B 8-bit GaLore layerwise, all of it (section 5.5)", "22.0 GB", layerwise, note)
    ours = estimate_memory("7b", "galore_dominant_adamw_8bit_layerwise", rank=1024)
    note = "what this package stores: fp32 bases, and projected gradients kept in fp32 until step()"
    yield Row("... the same as hf_lowrank keeps it", "22.0 GB", ours.total, note)


def roberta() -> Iterator[Row]:
    """Yield GaLore's Table 4."""
    encoder = 2 * sum(p.numel() for p in model("roberta-base").base_model.parameters())
    for (method, rank), figure in ROBERTA.items():
        n = numbers("roberta-base", rank or 4)
        low = {"GaLore": n["low-rank states"], "LoRA": 3 * n["factors"]}.get(method, 0)
        count = 2 * (n["weights"] + low) if rank else 6 * n["weights"]
        note = f"as if 4 bytes for each low-rank number, and no head: {(encoder + 4 * low) / 1e6:.1f}"
        if method == "GaLore":
            with_dense = (count + 2 * n["dense states"]) / 1e6
            note += f"; Adam's states of embeddings and head are left out, with them {with_dense:.0f}"
        what = f"RoBERTa-base, {method}" + f", rank {rank}" * bool(rank)
        yield Row(what, f"{figure} MB", count, note if rank else "")


def section(*, quick: bool = False) -> Section:
    """Return MiB of state for every method and size (quick: the first), in fp32 and 8 bits, on the meta device."""
    models = {size: load_model(size) for size in (BENCHMARKED[:1] if quick else BENCHMARKED)}
    adamw = {size: estimate_memory(net, "adamw_torch", dtype="fp32").state for size, net in models.items()}
    rows = [{"optimizer": "torch AdamW, fp32", **{size.upper(): round(x / 2**20) for size, x in adamw.items()}}]
    for row in METHODS:
        for ending, options in (("", {}), ("_8bit", {}), ("_8bit", EVERYTHING_8BIT)):
            label = f"{row}{ending}" + ", bases in 8 bits" * bool(options)
            try:
                own = METHODS[row].defaults.get("rank")  # APOLLO-Mini's 1; a share for those that compress by blocks
                state = {
                    size: estimate_memory(net, row + ending, rank=own or RANKS[size], options=options).state
                    for size, net in models.items()
                }
            except ValueError:  # a method without such an option
                continue
            rows.append({"optimizer": label, **{size.upper(): round(x / 2**20) for size, x in state.items()}})
    ranks = {size: RANKS[size] for size in models}
    result = Section(f"MiB of optimizer state, counted; ranks {ranks}", rows)
    for label, limit, options in (
        ("galore_i3s_adamw_8bit, bases in 8 bits", 0.19, EVERYTHING_8BIT),
        ("galore_i3s_adamw_8bit, bases in fp32", None, {}),
    ):
        state = estimate_memory(models["60m"], "galore_i3s_adamw_8bit", rank=128, options=options).state
        text = f"all optimizer state at 60M / AdamW's {adamw['60m'] / 2**20:.0f} MiB, {label}"
        result.targets.append(Target(text, limit, round(state / adamw["60m"], 4), "exact"))
    return result


def markdown(rows: list[Row]) -> str:
    """Return rows as a Markdown table."""
    lines = ["| figure | paper | counted, 10^9 (10^6) | 2^30 (2^20) | | remark |", "|---|---:|---:|---:|---|---|"]
    for row in rows:
        large, small = row.scaled
        lines.append(f"| {row.what} | {row.paper} | {large:.2f} | {small:.2f} | {row.verdict} | {row.note} |")
    return "\n".join(lines)


def main() -> None:
    """Print all tables."""
    print(f"GaLore (arXiv 2403.03507), Table 2\n\n{markdown(list(pretraining()))}\n")
    print(f"The same, LLaMA 7B\n\n{markdown(list(seven_billion()))}\n")
    print(f"The same, Table 4\n\n{markdown(list(roberta()))}")


if __name__ == "__main__":
    main()
