"""Optimizer state against held-out loss on a tiny LLaMA: learning rates tuned on one seed, scored on others.

    python recipes/studies/state_and_loss.py --minutes 45
    python recipes/studies/state_and_loss.py --draw

Model, text and tokenizer are the quickstart's, in shorter trainings. Every optimizer has the same number of learning
rates of the matrices; the one with the lowest loss on seed 1 is repeated with the other seeds, and only these count.
A finished run is a line of state_and_loss.jsonl and is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from transformers import LlamaForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed  # noqa: E402

import hf_lowrank  # noqa: E402


ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes" / "quickstart")]
from run_clm import Blocks, DataArguments, ModelArguments, llama_config, load_documents, perplexity  # noqa: E402

from recipes.shared.common import load_bpe, machine, negative_log_likelihood, sizes, state_bytes  # noqa: E402
from recipes.shared.rates import optimizer_with_two_rates  # noqa: E402


FILE = Path(__file__).with_suffix(".jsonl")
PICTURE = ROOT / "docs" / "pictures" / "state_and_loss.png"

STEPS, WARMUP, ROWS, TOKENS, EVAL_BLOCKS = 150, 15, 8, 128, 256
LEARNING_RATE = 0.04
"""Of embeddings, head and norms, for all: within 0.5 of the best perplexity of both optimizers in grid.json."""

TUNING_SEED, SEEDS = 1, (2, 3)
BASELINE = "adamw_torch_fused"
LOW_RANK = "rank=64,update_proj_gap=40"
DENSE_RATES, RATES = (6.25e-4, 1.25e-3, 2.5e-3), (1.25e-3, 2.5e-3, 5e-3)
OPTIMIZERS: dict[str, tuple[str | None, tuple[float, ...]]] = {
    BASELINE: (None, DENSE_RATES),
    "galore_dominant_adamw": (LOW_RANK, RATES),
    "galore_i3s_adamw": (LOW_RANK, RATES),
    "fira_i3s_adamw": (LOW_RANK, RATES),
    "subtrack_pp_adamw": (LOW_RANK, RATES),
    "apollo_mini_adamw": ("update_proj_gap=40", tuple(16 * rate for rate in DENSE_RATES)),
    "ldadam": ("rank=64", RATES),
    "galore_i3s_adamw_8bit": (LOW_RANK, RATES),
}
"""Options, and rates of the matrices (lr x scale): those of grid.json. APOLLO-Mini's step is a sixteenth of AdamW's
(the root of the width, 256) at the same rate, so its rates are sixteen times AdamW's."""


@dataclass(frozen=True)
class Text:
    """Blocks to train on and blocks held out, and the model's configuration."""

    training: Blocks
    held_out: Blocks
    config: Any

    @classmethod
    def load(cls) -> Text:
        """Return the quickstart's speeches in blocks of TOKENS."""
        documents, held_out = load_documents(DataArguments())
        tokenizer = load_bpe(documents, DataArguments().vocab_size, ROOT / "runs" / "state_and_loss")
        blocks = [Blocks.pack(texts, tokenizer, TOKENS) for texts in (documents, held_out)]
        return cls(blocks[0], blocks[1].spread(EVAL_BLOCKS), llama_config(ModelArguments(), tokenizer, TOKENS))


def train(text: Text, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Return the held-out loss (nats per token), the state in bytes, and what they were measured with."""
    set_seed(seed)
    model = LlamaForCausalLM(text.config)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, optim=name, optim_args=OPTIMIZERS[name][0], learning_rate=LEARNING_RATE, seed=seed,
            max_steps=STEPS, warmup_steps=WARMUP, lr_scheduler_type="cosine", per_device_train_batch_size=ROWS,
            per_device_eval_batch_size=32, save_strategy="no", report_to="none", disable_tqdm=True,
            dataloader_pin_memory=False, logging_steps=50,
        )  # fmt: skip
        trainer = Trainer(
            model,
            args,
            train_dataset=text.training,
            eval_dataset=text.held_out,
            data_collator=default_data_collator,
            compute_metrics=perplexity,
            preprocess_logits_for_metrics=negative_log_likelihood,
            optimizer_cls_and_kwargs=optimizer_with_two_rates(model, args, matrix_learning_rate=rate),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        loss = trainer.evaluate()["eval_loss"]
    found = {"loss": round(loss, 4), "state_bytes": state_bytes(trainer.optimizer), "seconds": round(seconds, 1)}
    return {**found, **sizes(model), "machine": machine()}


def settings(name: str, rate: float, seed: int) -> dict[str, Any]:
    """Return all that makes a run what it is; a recorded line with the same is that run."""
    return {
        "optimizer": name, "options": OPTIMIZERS[name][0], "matrix_learning_rate": rate,
        "learning_rate": LEARNING_RATE, "seed": seed, "steps": STEPS, "warmup_steps": WARMUP,
        "tokens_per_step": ROWS * TOKENS, "block_size": TOKENS, "held_out_tokens": EVAL_BLOCKS * TOKENS,
    }  # fmt: skip


def read(file: Path) -> list[dict[str, Any]]:
    """Return the finished runs."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def recorded(runs: list[dict[str, Any]], name: str, rate: float, seed: int) -> dict[str, Any] | None:
    """Return the finished run with these settings, or None."""
    wanted = settings(name, rate, seed)
    return next((run for run in runs if wanted.items() <= run.items()), None)


def best_rate(runs: list[dict[str, Any]], name: str) -> float | None:
    """Return the rate with the lowest loss on the seed for tuning; None while one of the rates is not done."""
    tuned = [recorded(runs, name, rate, TUNING_SEED) for rate in OPTIMIZERS[name][1]]
    done = [run for run in tuned if run is not None]
    if len(done) < len(tuned):
        return None
    return float(min(done, key=lambda run: run["loss"])["matrix_learning_rate"])


def missing(file: Path) -> Iterator[tuple[str, float, int]]:
    """Yield the runs to do: the rates of all optimizers, then the other seeds, one after the other."""
    for name, (_, rates) in OPTIMIZERS.items():
        yield from ((name, rate, TUNING_SEED) for rate in rates if not recorded(read(file), name, rate, TUNING_SEED))
    for seed in SEEDS:
        for name in OPTIMIZERS:
            rate = best_rate(read(file), name)
            if rate is not None and not recorded(read(file), name, rate, seed):
                yield name, rate, seed


def points(runs: list[dict[str, Any]]) -> dict[str, tuple[float, list[float]]]:
    """Return the state in MiB and the losses of the scoring seeds, of every optimizer that has such."""
    found = {}
    for name in OPTIMIZERS:
        rate = best_rate(runs, name)
        scored = [recorded(runs, name, rate, seed) for seed in SEEDS] if rate is not None else []
        done = [run for run in scored if run is not None]
        if done:
            found[name] = (done[0]["state_bytes"] / 2**20, [run["loss"] for run in done])
    return found


def draw(runs: list[dict[str, Any]], file: Path) -> None:
    """Draw what is recorded: mean and standard deviation over the scoring seeds, the name beside each point."""
    found = points(runs)
    figure, axes = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
    for name, (state, losses) in found.items():
        spread = stdev(losses) if len(losses) > 1 else 0.0
        colour = "#D55E00" if name == BASELINE else "#0072B2"
        axes.errorbar(state, mean(losses), spread, fmt="o", color=colour, capsize=4, markersize=6)
    axes.set(xlabel="optimizer state (MiB)", ylabel="held-out cross-entropy (nats per token)")
    axes.set_xlim(0, 1.12 * max(state for state, _ in found.values()))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption(runs, found), fontsize=8, x=0.02, ha="left")
    figure.draw_without_rendering()
    label(axes, {name: (state, mean(losses)) for name, (state, losses) in found.items()})
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def label(axes: plt.Axes, places: dict[str, tuple[float, float]]) -> None:
    """Write each name beside its point, at the first place where it covers no other name, no point and no edge."""
    taken: list[Any] = []
    dots = [axes.transData.transform(place) for place in places.values()]
    frame = axes.get_window_extent()
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        tries = [(dx, dy) for dy in (0, 10, -10, 20, -20, 32, -32, 46, -46) for dx in (9, -9)]
        for dx, dy in tries:
            side = "left" if dx > 0 else "right"
            text = axes.annotate(
                name, place, (dx, dy), textcoords="offset points", ha=side, va="center", fontsize=9,
                arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.6} if abs(dy) > 10 else None,
            )  # fmt: skip
            box = text.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(one) for one in taken) and not any(box.contains(*dot) for dot in dots):
                break
            if (dx, dy) != tries[-1]:
                text.remove()
        taken.append(box)


def caption(runs: list[dict[str, Any]], found: dict[str, Any]) -> str:
    """Return what was run: model, budget, seeds, hardware, and what is missing."""
    one = runs[0]
    seeds = [len(losses) for _, losses in found.values()]
    counts = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    absent = [name for name in OPTIMIZERS if name not in found]
    rates = len(OPTIMIZERS[BASELINE][1])
    lines = [
        f"A tiny model: it ranks nothing at size. LLaMA of {one['parameters'] / 1e6:.1f} M parameters (width 256, "
        f"3 layers), {STEPS} steps, {STEPS * ROWS * TOKENS / 1e3:.0f} thousand tokens;",
        f"rank 64 of 256 (apollo_mini_adamw: 1); best of {rates} learning rates on seed {TUNING_SEED}, then mean and "
        f"standard deviation over {counts} other seed{'s' * (max(seeds) > 1)}.",
        one["machine"],
    ]
    if absent or len(set(seeds)) > 1:
        lines.append(f"Cut by time; not there yet: {', '.join(absent) or 'some seeds'}.")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--file", type=Path, default=FILE, help="where results are recorded")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the picture to draw")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after this time")
    parser.add_argument("--draw", action="store_true", help="run nothing, draw what is recorded")
    arguments = parser.parse_args()
    if not arguments.draw:
        hf_lowrank.register()
        text, deadline = Text.load(), time.monotonic() + 60 * arguments.minutes
        for name, rate, seed in missing(arguments.file):
            if time.monotonic() > deadline:
                break
            run = {**settings(name, rate, seed), **train(text, name, rate, seed)}
            with arguments.file.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(f"{name}, matrices {rate:g}, seed {seed}: {run['loss']}", flush=True)
    if points(read(arguments.file)):
        draw(read(arguments.file), arguments.picture)


if __name__ == "__main__":
    main()
