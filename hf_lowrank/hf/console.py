"""What is seen on the console: our lines beside the progress bar, and no more metrics in a line than can be read."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback


logger = logging.getLogger("hf_lowrank")

CONSOLE_KEYS = 12
"""Most keys of ours in a line on the console; reporters, files and the log history get all of them."""

PRINTERS = (PrinterCallback, ProgressCallback)
"""The callbacks of transformers that print logs; Trainer puts one of them behind all others."""


class BesideBars(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes a message on a line of its own, above any progress bar that is drawn on the same terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:  # as any handler: a message must not end a run
            self.handleError(record)


def shortened(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a log as the console shows it: of our metrics the first ones that are not split by type of module."""
    ours = [key for key in logs if key.startswith("lowrank/")]
    left_out = {*ours} - {*[key for key in ours if key.count("/") == 1][:CONSOLE_KEYS]}
    return {key: value for key, value in logs.items() if key not in left_out}


def printing_less(on_log: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the `on_log` of a callback that prints, bound or not: what it is given is a copy."""

    @functools.wraps(on_log)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("logs") is not None:
            kwargs["logs"] = shortened(kwargs["logs"])
        return on_log(*args, **kwargs)

    return wrapped


def shorten_printers(callbacks: list[Any]) -> None:
    """Have the printers among a trainer's own callbacks print less; nothing of transformers is replaced."""
    for callback in callbacks:
        if isinstance(callback, PRINTERS):
            callback.on_log = printing_less(callback.on_log)


def show_messages() -> None:
    """Let the summary line and the warnings be seen on the main process, as transformers does with its own."""
    if not logger.handlers:
        handler = BesideBars()
        handler.setFormatter(logging.Formatter("[hf_lowrank] %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    if logger.level == logging.NOTSET:  # a level that the user has set stays
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
