"""What a model card says of the optimizer: a tag, the method, its resolved options, and what to cite."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_lowrank import __version__
from hf_lowrank.hf.arguments import name_of, unwrapped
from hf_lowrank.methods import papers, resolve, table
from hf_lowrank.observe.records import RUN_FILE
from hf_lowrank.optimizer import LowRankOptimizer


logger = logging.getLogger("hf_lowrank")


def describe_optimizer(self: Trainer) -> None:
    """Add the optimizer to the model card that Trainer has just written, if it is one of ours."""
    optimizer = unwrapped(self.optimizer)
    unbuilt = optimizer is None and name_of(self.args) in resolve.names()
    if not (unbuilt or isinstance(optimizer, LowRankOptimizer)) or not self.is_world_process_zero():
        return
    if (Path(self.args.output_dir) / RUN_FILE).exists():
        try:
            add_to_model_card(self.args.output_dir)
        except ValueError as error:  # it must not cost the upload of a trained model
            logger.warning("the model card says nothing of the optimizer: %s", error)


TAG = "hf-lowrank"
BEGIN, END = "<!-- hf_lowrank: begin -->", "<!-- hf_lowrank: end -->"

_SHARED = ("method", "format", "param_names", "weight_decay", "lr", "initial_lr", "betas", "eps")


def add_to_model_card(folder: str | Path) -> Path:
    """Add the optimizer to the README.md of a run's output folder.

    `Trainer.create_model_card`, and so `push_to_hub`, calls it by itself; a trainer that writes a card of its own
    does not. It may be called again: it replaces what it wrote before. A folder without a README.md gets one.

    Args:
        folder: the output folder of a run of ours.

    Returns:
        The card's path.

    Raises:
        ValueError: if the folder holds no run of ours.

    Example:
        >>> add_to_model_card("runs/mine")  # doctest: +SKIP
    """
    from huggingface_hub import ModelCard

    folder = Path(folder)
    try:
        run = json.loads((folder / RUN_FILE).read_text())
        text = section(run)
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    row = table.METHODS[resolve.split(name)[0]]
    lines = [
        "## Optimizer",
        "",
        f"Trained with `{name}` of `hf_lowrank` {run.get('version', __version__)}: {row.summary}.",
    ]
    groups = [group for group in run["groups"] if "rank" in group]
    if groups:
        projected = sum(len(group.get("param_names") or ()) for group in groups)
        counted = f"{projected} matrices" if projected else "matrices"
        lines += ["", f"Options of the {counted} that were trained in a subspace:", ""]
        lines += ["| option | value |", "|---|---|"]
        lines += [f"| `{key}` | {_values(key, groups)} |" for key in sorted(groups[0]) if key not in _SHARED]
    made = resolve.parts(groups[0]["method"], groups[0]) if groups else resolve.parts(resolve.split(name)[0], {})
    if cited := papers.of(row.paper, made.subspace, made.moments, made.reconstruction):
        lines += ["", "If you use this model, please cite:", "", *papers.listed(cited)]
        lines += ["", "```bibtex", *map(papers.bibtex, cited), "```"]
    return "\n".join(lines)


def _values(key: str, groups: list[dict[str, Any]]) -> str:
    """Return an option's value, or all of them where the groups differ."""
    return ", ".join(dict.fromkeys(str(group.get(key)) for group in groups))
