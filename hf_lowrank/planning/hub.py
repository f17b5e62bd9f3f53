"""Whether a model's configuration is within reach, found out before anything heavy is imported."""

from __future__ import annotations

import os
import re
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen


PATIENCE = 1.2
"""Seconds that the hub has for its first answer, unless HF_HUB_ETAG_TIMEOUT, its client's own setting, says more."""


def check_within_reach(model: str) -> None:
    """Return at once, or within `PATIENCE` where the hub has to be asked. A model in the hub's cache needs no hub.

    Raises:
        ValueError: for a path that does not exist, and for a hub id where the hub does not answer.
    """
    if re.fullmatch(r"(llama[-_ ]?)?[\d.]+[mb]", model.lower()) or Path(model).exists():
        return
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model) or model.endswith(".json"):
        raise ValueError(f"{model!r} is no file, folder, built-in size or id of a model on the hub")
    if offline():
        os.environ["HF_HUB_OFFLINE"] = "1"
        if not in_cache(model):
            raise ValueError(_out_of_reach(model, "HF_HUB_OFFLINE is set"))
    elif not answers(f"{endpoint()}/{model}/resolve/main/config.json", _patience()):
        if not in_cache(model):
            raise ValueError(_out_of_reach(model, f"{endpoint()} does not answer"))
        os.environ["HF_HUB_OFFLINE"] = "1"  # spares its client several attempts


def _out_of_reach(model: str, why: str) -> str:
    return (
        f"{model!r} is no file, folder or built-in size (60m ... 405b), the cache of hub models has no configuration "
        f"of it, and {why}. Give a folder with its config.json, or the file"
    )


def offline() -> bool:
    """Tell whether the user has asked for no network, as huggingface_hub does."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def endpoint() -> str:
    """Return the address of the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def in_cache(model: str) -> bool:
    """Tell whether the cache of huggingface_hub has a configuration of a model."""
    home = (
        os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    return any((cache / f"models--{model.replace('/', '--')}" / "snapshots").glob("*/config.json"))


def answers(address: str, seconds: float) -> bool:
    """Tell whether a server answers within some seconds, whatever it says; a name that cannot be resolved counts."""
    found: list[bool] = []
    asking = Thread(target=lambda: found.append(_asked(address, seconds)), daemon=True)
    asking.start()
    asking.join(seconds)  # looking up a name has no time-out of its own
    return bool(found and found[0])


def _asked(address: str, seconds: float) -> bool:
    try:
        urlopen(Request(address, method="HEAD"), timeout=seconds).close()
    except HTTPError:
        return True  # "not found", say, which its client will report
    except (URLError, OSError, ValueError):
        return False
    return True


def _patience() -> float:
    try:
        return max(PATIENCE, float(os.environ.get("HF_HUB_ETAG_TIMEOUT", "")))
    except ValueError:
        return PATIENCE
