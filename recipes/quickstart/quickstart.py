"""Train the same LLaMA with AdamW, muon_4bit and galore_i3s_adamw, and compare: a table, pictures, checkpoints.

Every run starts afresh: what an earlier one, finished or killed, left in the output folder is replaced; only the
tokenizer is kept. Options that are not listed go to all trainings, for instance

    python recipes/quickstart/quickstart.py --max_steps 1000 --train_file mine.txt --validation_file other.txt
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn


HERE = Path(__file__).resolve().parent
GRID_FILE = HERE.parent / "studies" / "grid.json"
RANK, GAP, SEED = 0.25, 40, 1

OPTIMIZERS = {
    "adamw_torch_fused": "--matrix_lr_scale {scale:g}",
    "muon_4bit": "--optim_args scale={scale:g}",
    "galore_i3s_adamw": f"--optim_args rank={RANK},update_proj_gap={GAP},scale={{scale:g}}",
}
"""The trainings: value of --optim, and how the matrices' rate is spelled. All have two rates: `learning_rate` for
embeddings, head and norms, `learning_rate` x `scale` for the matrices."""

COMMON = (
    "--do_train --do_eval --max_steps 300 --per_device_train_batch_size 8 --per_device_eval_batch_size 8 "
    f"--block_size 256 --lr_scheduler_type cosine --warmup_steps 30 --seed {SEED} --report_to none "
    "--dataloader_pin_memory False"
)
LOGGING = "--logging_steps 10 --eval_strategy steps --eval_steps 50 --save_steps 150 --save_total_limit 1"
ENVIRONMENT = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
"""Threads that wait for each other sleep instead of spinning: a few percent slower on an idle machine, several times
faster on a busy one."""

LEDGER = "commands.txt"
OWN = ("--optim", "--matrix_lr_scale", "--resume_from_checkpoint")
"""Options that the trainings do not share."""

OPTIONS = 4
"""Words of a command before its options: python -m hf_lowrank run_clm.py."""


def command(optimizer: str, cell: dict[str, float], output_dir: Path, tokenizer_dir: Path, *more: str) -> list[str]:
    """Return the command line of one training.

    Args:
        optimizer: a key of OPTIMIZERS.
        cell: `learning_rate` and `scale`.
        output_dir: folder of the run.
        tokenizer_dir: where tokenizers are kept.
        more: options that come last, and so win.
    """
    python = Path(sys.executable)
    start = [_short(python), "-m", "hf_lowrank", _short(HERE / "run_clm.py"), "--optim", optimizer]
    rates = f"{OPTIMIZERS[optimizer].format(scale=cell['scale'])} --learning_rate {cell['learning_rate']:g}"
    folders = ["--output_dir", str(output_dir), "--tokenizer_dir", str(tokenizer_dir)]
    return [*start, *rates.split(), *COMMON.split(), *folders, *more]


def best(runs: list[dict], optimizer: str, file: Path) -> dict:
    """Return a file's run of an optimizer with the lowest perplexity, of those with the quickstart's seed."""
    mine = [run for run in runs if (run["optimizer"], run["seed"]) == (optimizer, SEED)]
    known = [run for run in mine if run["perplexity"] is not None]
    if not known:
        stop(f"{file} has no result for {optimizer}; run grid.py")
    return min(known, key=lambda run: run["perplexity"])


def rates(file: Path) -> dict[str, dict[str, float]]:
    """Return the best recorded rates of every optimizer."""
    try:
        runs = json.loads(file.read_text())["runs"]
        found = {optimizer: best(runs, optimizer, file) for optimizer in OPTIMIZERS}
        return {name: {key: float(run[key]) for key in ("learning_rate", "scale")} for name, run in found.items()}
    except (OSError, ValueError, KeyError, TypeError):
        stop(f"--grid {file} is no file that grid.py has written")


def stop(sentence: str, code: int = 2) -> NoReturn:
    """End with one sentence for people; here, since it has to say what is not installed."""
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {sentence}\n")
    sys.exit(code)


def main() -> None:
    """Run all trainings and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"), help="run folder")
    parser.add_argument("--grid", type=Path, default=GRID_FILE, help="file of grid.py, whose best rates are taken")
    arguments, more = parser.parse_known_args()
    if own := next((option for option in more if option.startswith(OWN)), None):
        stop(f"{own} is the trainings' own here; start one by itself: python -m hf_lowrank {_short(HERE)}/run_clm.py")
    try:
        import report
        import run_clm

        import hf_lowrank
    except ImportError as error:
        stop(f"{error}; install the recipe's requirements: pip install '.[recipes]'")
    hf_lowrank.register()
    folder, commands = arguments.output_dir, {}
    for optimizer, cell in rates(arguments.grid).items():
        line = command(optimizer, cell, folder / optimizer, folder / "tokenizer", *LOGGING.split(), *more)
        arguments_of_one = run_clm.parse(line[OPTIONS:])
        commands[optimizer] = line
    check_folder(folder)
    run_clm.read(*arguments_of_one[1:])  # the texts; what ends here has cost nothing
    prepare(folder)
    signal.signal(signal.SIGTERM, lambda *_: stop("terminated; a new start begins afresh", 143))  # training ends too
    start = time.perf_counter()
    for line in commands.values():
        train(line, folder / LEDGER)
    results = report.collect(folder, commands)
    results["seconds"] = round(time.perf_counter() - start, 1)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table = report.table(results)
    (folder / "table.md").write_text(table)
    report.plot_losses(folder, list(OPTIMIZERS))
    report.plot_overlap(folder / "galore_i3s_adamw")
    print(f"\n{table}\nIn {folder}, after {results['seconds']:.0f} s:")
    print("\n".join(f"  {path.name}{'/' * path.is_dir()}" for path in sorted(folder.iterdir())))


def check_folder(folder: Path) -> None:
    """Refuse a run folder that holds something else."""
    if folder.exists() and not folder.is_dir():
        stop(f"{folder} is not a folder; choose another --output_dir")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if there - {"tokenizer"} and LEDGER not in there:
        stop(f"{folder} holds something that this recipe did not write; choose another --output_dir")


def prepare(folder: Path) -> None:
    """Make the run folder ready for a fresh start."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LEDGER).write_text("")
    for optimizer in OPTIMIZERS:
        shutil.rmtree(folder / optimizer, ignore_errors=True)
    for name in ("results.json", "table.md", "loss.png", "subspace_overlap.png"):
        (folder / name).unlink(missing_ok=True)


def train(line: list[str], ledger: Path) -> None:
    """Print and record a command, run it, and end with its exit code if it fails."""
    text = " ".join([*(f"{name}={value}" for name, value in ENVIRONMENT.items()), shlex.join(line)])
    print(f"\n$ {text}", flush=True)
    with ledger.open("a") as file:
        file.write(text + "\n")
    try:
        code = subprocess.run(line, env={**os.environ, **ENVIRONMENT}).returncode
    except KeyboardInterrupt:
        stop("interrupted; a new start begins afresh", 130)
    if code:
        stop("the training above failed", code if code > 0 else 1)


def _short(path: Path) -> str:
    """Return a path relative to the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    main()
