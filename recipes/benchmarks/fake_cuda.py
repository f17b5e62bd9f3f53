"""What a step would ask of a GPU, counted without one: fake CUDA tensors of true shapes, and every operation on them.

A fake tensor has a shape, a type and a device, and no memory. Under `Counted` every operation on one is written down:

* launches: operations that do work on the device. A multi-tensor operation is one, as torch calls it; on the device it
  is a kernel for some 20 million elements.
* syncs: where the host waits for the device: a number that is read, a copy from one to the other that is not pinned,
  an index of booleans. What a decomposition checks within itself (`torch.linalg.eigh` reads an error code) is the
  library's, and not seen here.
* bytes: what every operation reads and writes, as if no cache held any of it.
* flops: of matrix products, by the type of what is multiplied.
* largest: elements of the largest tensor that is allocated, and where.
* mixed: operations that were given tensors of two devices; a number on the CPU beside them is allowed.

Nothing is computed: numbers that are read are 1 or true. What was counted here has not been timed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_lowrank
from hf_lowrank.methods.moments import adam
from hf_lowrank.state import formats
from hf_lowrank.tensors import fused, products, random


DEVICE = torch.device("cuda:0")
PACKAGE = str(Path(hf_lowrank.__file__).parent)
FAKE = FakeTensorMode(allow_non_fake_inputs=True)

FREE = {
    *(
        "view",
        "transpose",
        "t",
        "narrow",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "detach",
        "alias",
        "split",
    ),
    *("permute", "_reshape_alias", "split_with_sizes", "unbind", "diagonal", "as_strided", "_unsafe_view", "unfold"),
    *(
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "lift_fresh",
        "set_",
        "is_pinned",
        "device",
    ),
}
"""Operations that launch nothing."""

FILLS = {"fill_", "zero_", "random_", "copy_", "normal_", "uniform_"}
"""Operations that do not read what they write."""

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""Where the left factor of a matrix product stands among its arguments."""


def where() -> str:
    """Return the innermost line of the package that is being run."""
    frame: Any = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    file = frame.f_code.co_filename.removeprefix(PACKAGE).strip("/")
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


class Counted(TorchDispatchMode):
    """Counts what is done on fake CUDA tensors while it is active.

    Attributes:
        launches, syncs, mixed: how often, by operation, by (kind, line) and by (operation, line).
        flops: by type.
        moved: bytes that are read and written, by operation.
        peak: bytes of all tensors that were made and not yet given back, at most.
        largest: (elements, operation, line) of the largest tensor that was allocated.
    """

    active: list[Counted] = []

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[tuple[str, str]] = Counter()
        self.mixed: Counter[tuple[str, str]] = Counter()
        self.flops: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.largest = (0, "", "")
        self.peak = 0
        self._live: dict[StorageWeakRef, int] = {}

    def __enter__(self) -> Counted:
        Counted.active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        Counted.active.pop()

    @property
    def bytes(self) -> int:
        """Bytes that all operations read and write."""
        return sum(self.moved.values())

    def waits(self, kind: str) -> None:
        """Note that the host waits."""
        self.syncs[kind, where()] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = kwargs.get("device")
        on_host = target is None or torch.device(target).type == "cpu"
        if on_host and not any(isinstance(x, FakeTensor) for x in given):  # counters and the like are real
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        devices = {x.device.type for x in given}
        if name == "_to_copy" and {x.device.type for x in made} != devices:
            self.copies(given[0], made[0], kwargs.get("non_blocking", False))
            return out
        if "cuda" not in devices | {x.device.type for x in made}:
            return out
        if len(devices) > 1 and any(x.dim() for x in given if x.device.type == "cpu"):
            self.mixed[name, where()] += 1
        if name not in FREE:
            self.launches[name] += 1
            self.count_bytes(func, name, args, kwargs, given, made)
        for x in made if "empty" in name or not (name in FREE or name.endswith("_")) else ():
            if x.numel() > self.largest[0]:
                self.largest = x.numel(), name, where()
            if x.device.type == "cuda":
                self._live[StorageWeakRef(x.untyped_storage())] = x.untyped_storage().nbytes()
        self._live = {ref: size for ref, size in self._live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._live.values()))
        if name in PRODUCTS:
            A, B = args[PRODUCTS[name]], args[PRODUCTS[name] + 1]
            self.flops[str(A.dtype).removeprefix("torch.")] += 2 * A.numel() * B.shape[-1]
        return out

    def copies(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        """Note a copy between the host and the device."""
        self.launches["memcpy"] += 1
        if source.device.type == "cuda" or not non_blocking:
            self.waits("to the host" if source.device.type == "cuda" else "to the device")

    def count_bytes(
        self, func: Any, name: str, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]
    ) -> None:
        """Add what an operation reads and writes."""
        values = [*zip(func._schema.arguments, args, strict=False)]
        values += [(arg, kwargs[arg.name]) for arg in func._schema.arguments if arg.name in kwargs]
        written = [
            x
            for arg, value in values
            if arg.alias_info is not None and arg.alias_info.is_write
            for x in tree_leaves(value)
            if isinstance(x, Tensor)
        ]
        fills = name in FILLS or any(arg.is_out for arg, _ in values)
        read = [x for x in given if not (fills and any(x is y for y in written))]
        fresh = [x for x in made if not any(x is y for y in written)]
        self.moved[name] += sum(map(nbytes, (*read, *written, *fresh)))


def nbytes(x: Tensor) -> int:
    """Return the bytes of different elements: an expanded axis is read once."""
    size = x.element_size() if x.device.type == "cuda" else 0
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else 1
    return size


# ---- what a build without CUDA cannot do on fake CUDA tensors -------------------------------------------------------


def _reads(kind: str, value: Any) -> Any:
    def read(self: FakeTensor) -> Any:
        if Counted.active and self.device.type == "cuda":
            Counted.active[-1].waits(kind)
        return value

    return read


def _tolist(self: FakeTensor) -> Any:
    if Counted.active and self.device.type == "cuda":
        Counted.active[-1].waits("read")

    def built(shape: Any) -> Any:
        one = True if self.dtype == torch.bool else 1.0 if self.dtype.is_floating_point else 1
        return [built(shape[1:]) for _ in range(shape[0])] if shape else one

    return built(tuple(self.shape))


def _getitem(self: FakeTensor, key: Any) -> Any:
    """Index by slices, numbers and None; a mask of booleans keeps everything."""
    keys = key if isinstance(key, tuple) else (key,)
    if any(isinstance(k, Tensor) for k in keys):
        if keys[0].dtype == torch.bool:
            if Counted.active and self.device.type == "cuda":
                Counted.active[-1].waits("a mask")
            return self.clone().reshape(-1)
        return torch.ops.aten.index(self, list(keys))
    if Ellipsis in keys:
        i = keys.index(Ellipsis)
        missing = self.dim() - sum(1 for k in keys if k is not None and k is not Ellipsis)
        keys = keys[:i] + (slice(None),) * missing + keys[i + 1 :]
    x, axis = self, 0
    for k in keys:
        if k is None:
            x, axis = x.unsqueeze(axis), axis + 1
        elif isinstance(k, slice):
            start, stop, step = k.indices(x.shape[axis])
            if (start, stop, step) != (0, x.shape[axis], 1):
                x = torch.ops.aten.slice(x, axis, start, stop, step)
            axis += 1
        else:
            x = x.select(axis, int(k))
    return x


def _setitem(self: FakeTensor, key: Any, value: Any) -> None:
    target = _getitem(self, key)
    target.copy_(value) if isinstance(value, Tensor) else target.fill_(value)


def _copy(self: FakeTensor, source: Tensor, non_blocking: bool = False) -> FakeTensor:
    counted = Counted.active[-1] if Counted.active else None
    assert torch.broadcast_shapes(self.shape, source.shape) == self.shape
    if counted is not None and self.device.type != source.device.type:
        counted.copies(source, self, non_blocking)
    elif counted is not None and self.device.type == "cuda":
        counted.launches["copy_"] += 1
        counted.moved["copy_"] += nbytes(self) + nbytes(source)
    return self


PATCHES = {
    "__float__": _reads("read", 1.0),
    "__bool__": _reads("read", True),
    "__int__": _reads("read", 1),
    "item": _reads("read", 1.0),
    "tolist": _tolist,
    "__getitem__": _getitem,
    "__setitem__": _setitem,
    "copy_": _copy,
    "__and__": lambda self, other: torch.bitwise_and(self, other),
    "__invert__": lambda self: torch.bitwise_not(self),
    "__or__": lambda self, other: torch.bitwise_or(self, other),
}


@contextmanager
def fake_cuda() -> Iterator[None]:
    """Let fake tensors on `DEVICE` be made and used, on a build of torch without CUDA too."""
    before = {name: FakeTensor.__dict__.get(name) for name in PATCHES}
    generator, runs_on = random.generator, fused.runs_on

    def on_host(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
        return generator(*key)

    def clear() -> None:
        adam.has_fused_kernel.cache_clear()
        adam._step_tensor.cache_clear()
        products.has_mixed_product.cache_clear()
        formats._levels_of_bytes.cache_clear()

    for name, patch in PATCHES.items():
        setattr(FakeTensor, name, patch)
    random.generator = on_host
    fused.runs_on = lambda device: device.type == "cuda"
    clear()
    try:
        with FAKE:
            yield
    finally:
        random.generator, fused.runs_on = generator, runs_on
        clear()
        for name, own in before.items():
            if own is None:
                delattr(FakeTensor, name)
            else:
                setattr(FakeTensor, name, own)
