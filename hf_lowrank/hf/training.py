"""What surrounds a training of a Trainer, whichever way our optimizers came to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_lowrank.hf.arguments import unwrapped
from hf_lowrank.hf.clipping import give_clipping_back
from hf_lowrank.hf.layer_sampling import sample_layers, wake_layers
from hf_lowrank.observe import folder
from hf_lowrank.optimizer import LowRankOptimizer


@contextmanager
def around_training(trainer: Any) -> Iterator[None]:
    """Add layer sampling where it is asked for; however the training ends, leave nothing of ours behind.

    That is: no layer is asleep, the arguments are as they were, no hook takes the gradients from the next optimizer,
    and others may have the output folder, unless this was a training within another.
    """
    output = Path(trainer.args.output_dir)
    sample_layers(trainer)
    try:
        with folder.going_on(output):
            yield
    finally:
        wake_layers(trainer)
        give_clipping_back(trainer.args)
        optimizer = unwrapped(trainer.optimizer)
        if isinstance(optimizer, LowRankOptimizer):
            optimizer.remove_hooks()
            optimizer.layerwise.forget()
