"""What a model card says of the optimizer: a tag, the method, its resolved options, and what to cite."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from hf_lowrank import __version__, methods
from hf_lowrank.records import RUN_FILE


TAG = "hf-lowrank"
BEGIN, END = "<!-- hf_lowrank: begin -->", "<!-- hf_lowrank: end -->"

TITLES = {
    "2403.03507": "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
    "2410.01623": "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
    "2502.05790": "I3S: Importance Sampling Subspace Selection for Low-Rank Optimization in LLM Pretraining",
    "2410.11289": "Subspace Optimization for Large Language Models with Convergence Guarantees",
}
"""Titles of the papers, by arXiv number; one that is not here is cited by its number."""

_SHARED = ("method", "format", "param_names", "weight_decay", "lr", "initial_lr", "betas", "eps")


def add_to_model_card(folder: str | Path) -> Path:
    """Add the optimizer to the README.md of a run's output folder, which `Trainer.create_model_card` has written.

    It may be called again after each training: it replaces what it wrote before. A folder without a README.md gets
    one.

    Args:
        folder: the output folder of a run of ours.

    Returns:
        The card's path.

    Raises:
        ValueError: if the folder holds no run of ours.

    Example:
        >>> trainer.create_model_card()  # doctest: +SKIP
        >>> add_to_model_card(trainer.args.output_dir)  # doctest: +SKIP
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    try:
        run = json.loads((folder / RUN_FILE).read_text())
        text = section(run)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} has no readable {RUN_FILE}: it is not a run of ours ({error})") from None
    file = folder / "README.md"
    card = ModelCard(file.read_text() if file.exists() else "---\ntags: []\n---\n", ignore_metadata_errors=True)
    tags = list(card.data.get("tags") or [])
    card.data["tags"] = [*tags, *({TAG} - set(tags))]
    kept = re.sub(f"\\s*{re.escape(BEGIN)}.*?{re.escape(END)}\\s*", "\n\n", card.text, flags=re.DOTALL)
    card.text = f"{kept.strip()}\n\n{BEGIN}\n{text}\n{END}\n"
    card.save(file)
    return file


def section(run: dict[str, Any]) -> str:
    """Return the card's section as Markdown.

    Args:
        run: the contents of RUN_FILE.
    """
    name = run["optimizer"]
    row = methods.METHODS[methods.split(name)[0]]
    lines = [
        "## Optimizer",
        "",
        f"Trained with `{name}` of [hf_lowrank](https://pypi.org/project/hf_lowrank/) {__version__}: {row.summary}.",
    ]
    low_rank = next((group for group in run["groups"] if "rank" in group), None)
    if low_rank is not None:
        projected = sum(len(group.get("param_names") or ()) for group in run["groups"] if "rank" in group)
        lines += ["", f"Options of the {projected} matrices that were trained in a subspace:", ""]
        lines += ["| option | value |", "|---|---|"]
        lines += [f"| `{key}` | {value} |" for key, value in sorted(low_rank.items()) if key not in _SHARED]
    if cited := re.findall(r"arXiv (\d{4}\.\d{5})", row.paper):
        lines += ["", "If you use this model, please cite:", ""]
        lines += [f"* {TITLES.get(number, 'arXiv')} ([{number}](https://arxiv.org/abs/{number}))" for number in cited]
        lines += ["", "```bibtex", *(bibtex(number) for number in cited), "```"]
    return "\n".join(lines)


def bibtex(number: str) -> str:
    """Return a BibTeX entry for an arXiv number."""
    title = TITLES.get(number, f"arXiv:{number}")
    lines = [
        f"@misc{{arxiv_{number},",
        f"  title = {{{title}}},",
        f"  eprint = {{{number}}},",
        "  archivePrefix = {arXiv},",
        f"  url = {{https://arxiv.org/abs/{number}}}",
        "}",
    ]
    return "\n".join(lines)
