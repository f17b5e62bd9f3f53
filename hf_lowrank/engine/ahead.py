"""Bases that are chosen beside the steps (`async_refresh`): by a thread, on a stream of its own, for a later step.

A decomposition on an accelerator keeps the host waiting, so a stream alone would not do. What a refresh looks at is
copied as it begins, and what it chose lies in the state (`plan.ahead`), from where it is adopted at a step that is
known from the start: neither its time nor a checkpoint on the way changes a bit of the run. With TF32 on
(`--tf32`) the overlap that is measured may be of rounded bases or not: torch's flag is the process's, and the steps
set it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_lowrank.engine import step
from hf_lowrank.engine.matrix import MatrixStep
from hf_lowrank.engine.plan import NEXT
from hf_lowrank.engine.refresh import Refresh
from hf_lowrank.engine.unit import Unit
from hf_lowrank.state.view import View
from hf_lowrank.tensors import products


class Ahead:
    """The refreshes that go on beside the steps of one optimizer, one after the other."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, Any] = {}
        self._going_on: dict[Tensor, Future[None]] = {}

    def begin_(self, due: Sequence[MatrixStep], flags: Mapping[Unit, Sequence[bool]]) -> int:
        """Begin refreshes; each is adopted when its matrix has had `async_refresh` more steps.

        A gradient that is not finite begins none: its step will be skipped, and the refresh stays due.

        Args:
            due: the matrices, each with a basis.
            flags: what is known of their gradients: whether they are finite.

        Returns:
            How many were begun.
        """
        good = [unit for unit in due if all(flags[unit] if unit in flags else step.finite([unit.gradient]))]
        for unit in good:
            refresh = Refresh(unit, owner=0)
            step.advance([refresh.collect_()], [None])
            assert refresh.gradient is not None
            refresh.gradient = refresh.gradient.clone()  # the next backward may write in it
            refresh.old = {name: tensor.clone() for name, tensor in refresh.new.items()}  # and the next step drop this
            unit.stored["next_report"].zero_()
            unit.stored["adopt_at"].copy_(unit.stored["step"] + unit.ahead)
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "hf_lowrank refresh")
            stream = self._stream(unit.device)
            ready = None if stream is None else _module(unit.device).current_stream(unit.device).record_event()
            self._going_on[unit.weight] = self._thread.submit(_choose, refresh, stream, ready)
        return len(good)

    @products.precision("ieee")
    def adopt_(self, units: Sequence[MatrixStep]) -> None:
        """Adopt the bases whose step has come; the host waits for those that are not there yet."""
        due = [unit for unit in units if unit.ahead and 0 < int(unit.stored["adopt_at"]) <= int(unit.stored["step"])]
        if not due:
            return
        self._wait([unit.weight for unit in due])
        reports = torch.stack([unit.stored["next_report"] for unit in due]).tolist()
        for unit, (changed, overlap, *_) in zip(due, reports, strict=True):
            unit.stored["adopt_at"].zero_()
            if changed:
                refresh = Refresh(unit, owner=0)
                refresh.choice.copy_(unit.stored["next_report"])
                refresh.new = {name: unit.view[NEXT + name].clone() for name in unit.view.bases}
                unit.view.forget()
                refresh.adopt_(overlap, None)

    def settle(self) -> None:
        """Wait for all that goes on: then the state says everything."""
        self._wait([*self._going_on])

    def _wait(self, weights: Sequence[Tensor]) -> None:
        """Wait for the refreshes of some weights.

        Raises:
            Exception: what one of them raised.
        """
        for ended in [self._going_on.pop(weight) for weight in weights if weight in self._going_on]:
            ended.result()

    def _stream(self, device: torch.device) -> Any:
        """Return the stream of a device on which bases are chosen; None where there are no streams."""
        if device.type != "cpu" and device not in self._streams:
            module = _module(device)
            self._streams[device] = module.Stream(device) if hasattr(module, "Stream") else None
        return self._streams.get(device)


def _choose(refresh: Refresh, stream: Any, ready: Any) -> None:
    """Choose a basis in a thread, and leave it in the state.

    Args:
        refresh: what has been collected.
        stream: where the work goes; None: where the device's other work is.
        ready: the event after which all is there that the refresh looks at.
    """
    unit, _kept = refresh.unit, refresh.gradient  # till the stream is done with it
    with torch.no_grad(), products.flags_left(), _on(stream, unit.device):
        if stream is not None:
            stream.wait_event(ready)
        refresh.choose_(finite=True)
        with View(unit.stored, unit.plan.buffers, unit.plan.encodings).writing(bases=True) as s:
            for name, tensor in refresh.new.items():
                s[NEXT + name].copy_(tensor)
            s["next_report"].copy_(refresh.choice)
        if stream is not None:
            stream.synchronize()


@contextmanager
def _on(stream: Any, device: torch.device) -> Iterator[None]:
    """Send what follows in this thread to a stream."""
    if stream is None:
        yield
        return
    with _module(device).stream(stream):
        yield


def _module(device: torch.device) -> Any:
    """Return what torch has for a kind of device: torch.cuda for CUDA."""
    return torch.get_device_module(device)
