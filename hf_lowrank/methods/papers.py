"""The papers that methods come from: by arXiv number, their titles and addresses. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


TITLES = {
    "1412.6980": "Adam: A Method for Stochastic Optimization",
    "1804.04235": "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
    "1711.05101": "Decoupled Weight Decay Regularization",
    "1901.11150": "Memory-Efficient Adaptive Optimization",
    "2306.09782": "Full Parameter Fine-tuning for Large Language Models with Limited Resources",
    "2307.02047": "CAME: Confidence-guided Adaptive Memory Efficient Optimization",
    "2310.10195": "AdaLomo: Low-memory Optimization with Adaptive Learning Rate",
    "2402.03293": "Flora: Low-Rank Adapters Are Secretly Gradient Compressors",
    "2403.03507": "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    "2406.16793": "Adam-mini: Use Fewer Learning Rates To Gain More",
    "2406.17660": "Grass: Compute Efficient Low-Memory LLM Training with Structured Sparse Gradients",
    "2407.08296": "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
    "2408.12857": "Memory-Efficient LLM Training with Online Subspace Descent",
    "2410.01623": "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
    "2410.11289": "Subspace Optimization for Large Language Models with Convergence Guarantees",
    "2410.16029": "Natural GaLore: Accelerating GaLore for memory-efficient LLM Training and Fine-tuning",
    "2410.16103": "LDAdam: Adaptive Optimization from Low-Dimensional Gradient Statistics",
    "2411.07837": "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training",
    "2412.13148": "SWAN: SGD with Normalization and Whitening Enables Stateless LLM Training",
    "2412.05270": "APOLLO: SGD-like Memory, AdamW-level Performance",
    "2501.07237": "Breaking Memory Limits: Gradient Wavelet Transform Enhances LLMs Training",
    "2502.01586": "SubTrack++: Gradient Subspace Tracking for Scalable LLM Training",
    "2502.05790": "I3S: Importance Sampling Subspace Selection for Low-Rank Optimization in LLM Pretraining",
    "2502.06742": "Gradient Multi-Normalization for Stateless and Scalable LLM Training",
    "2502.07752": (
        "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a Low-Rank Extension"
    ),
    "2502.17055": "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam",
    "2502.16982": "Muon is Scalable for LLM Training",
    "2505.16932": "The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon Algorithm",
    "2505.24749": ("SUMO: Subspace-Aware Moment-Orthogonalization for Accelerating Memory-Efficient LLM Training"),
    "2506.16659": "A Minimalist Optimizer Design for LLM Pretraining",
    "2510.01878": "Randomized Gradient Subspaces for Efficient Large Language Model Training",
    "2510.05491": "NorMuon: Making Muon More Efficient and Scalable",
    "2512.07112": "FOAM: Folded Optimizer with Approximate Moment",
    "2603.20527": "RMNP: Row-Momentum Normalized Preconditioning for Scalable Matrix-Based Optimization",
}
"""Titles by arXiv number. A paper that is not here is cited by its number."""

_NUMBER = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})")


def numbers(text: str | None) -> list[str]:
    """Return the arXiv numbers that a text names, as in "arXiv 2403.03507", in order, each once."""
    return list(dict.fromkeys(_NUMBER.findall(text or "")))


def of(paper: str, subspace: Any, moments: Any, reconstruction: Any) -> list[str]:
    """Return the arXiv numbers to cite for a row of the table and its parts.

    The row's own come first. A part adds the first paper that the References of its docstring name: moments always,
    which come from papers of their own; a subspace or a reconstruction unless it names one that is cited already.

    Args:
        paper: what the row says of its source; no number, for a method of one's own.
        subspace, moments, reconstruction: the parts.

    Example:
        >>> of("arXiv 2502.05790", None, None, None)
        ['2502.05790']
    """
    cited = numbers(paper)
    for part in (subspace, moments, reconstruction):
        named = numbers(type(part).__doc__)
        if part is moments or not set(named) & set(cited):
            cited += named[:1]
    return list(dict.fromkeys(cited))


def title(number: str) -> str:
    """Return a paper's title, or its number where the title is not known."""
    return TITLES.get(number, f"arXiv:{number}")


def url(number: str) -> str:
    """Return where a paper is."""
    return f"https://arxiv.org/abs/{number}"


def linked(text: str) -> str:
    """Turn every "arXiv NUMBER" of a text into a Markdown link."""
    return _NUMBER.sub(lambda found: f"[{' '.join(found[0].split())}]({url(found[1])})", text)


def listed(cited: Iterable[str]) -> list[str]:
    """Return a line of Markdown for every paper."""
    return [f"* {title(number)} ([{number}]({url(number)}))" for number in cited]


def table() -> str:
    """Return all papers as a Markdown table, the oldest first."""
    rows = [f"| {title} | [{number}]({url(number)}) |" for number, title in sorted(TITLES.items())]
    return "\n".join(["| title | arXiv |", "|---|---|", *rows])


def bibtex(number: str) -> str:
    """Return a BibTeX entry."""
    lines = [
        f"@misc{{arxiv_{number},",
        f"  title = {{{title(number)}}},",
        f"  eprint = {{{number}}},",
        "  archivePrefix = {arXiv},",
        f"  url = {{{url(number)}}}",
        "}",
    ]
    return "\n".join(lines)
