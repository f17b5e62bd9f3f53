"""The two products of a step, P^T G and P Z, and the precision in which they are computed.

* `ieee`: fp32, whatever torch's flags say.
* `tf32`: fp32 numbers rounded to 10 bits of mantissa as they are multiplied (CUDA's tensor cores), sums in fp32.
* `bf16`: both factors rounded to bf16, sums in fp32; P Z rounded to bf16 again if the weight is of low precision.
* `bf16x2`: P in P^T G as the sum of two numbers of bf16, so that next to nothing is lost of it, or of a gradient of
  bf16; in P Z both factors, and the product, rounded to bf16, which a weight of bf16 does not notice.
* `auto`: bf16x2 for gradients and weights of bf16 on a device that has kernels for them; any others in fp32, or TF32
  where torch's own flag says so.

The kernels of a CPU that has instructions for bf16 (AVX-512 BF16, AMX) sum in fp32 and give bf16: there R is rounded
too, for bf16x2 as the sum of two that are. Where a device has no kernels, factors are rounded first and multiplied as
fp32, which gives the numbers of an accelerator.

Legend: P (..., m, r) · G (..., m, n) · R = P^T G (..., r, n) · Z (..., r, n).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import local

import torch
from torch import Tensor

from hf_lowrank.tensors import kernels


OWN = "own"
"""fp32 as torch's flags say."""


def chosen(kind: str, like: Tensor) -> str:
    """Return what `auto` means for a gradient or weight."""
    if kind != "auto":
        return kind
    return "bf16x2" if like.dtype == torch.bfloat16 and _has_kernels(like.device) else OWN


def unrounded(like: Tensor) -> str:
    """Return what loses next to nothing of P^T G for a gradient, and of P Z for an fp32 matrix, whatever torch's flags
    say: in bf16x2 R is off by 2e-6 where sums stay in fp32."""
    return "bf16x2" if like.dtype == torch.bfloat16 and has_mixed_product(like.device) else "ieee"


def _has_kernels(device: torch.device) -> bool:
    return has_bf16_product() if device.type == "cpu" else has_mixed_product(device)


def rounds(kind: str) -> bool:
    """Tell whether products of this kind are of numbers rounded to bf16."""
    return kind in ("bf16", "bf16x2")


@lru_cache
def has_bf16_product() -> bool:
    """Tell whether this CPU multiplies matrices of bf16, into one of bf16, faster than those of fp32."""
    library = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return library and any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


@lru_cache
def has_mixed_product(device: torch.device) -> bool:
    """Tell whether a device multiplies matrices of bf16 into one of fp32: tried once on a small one."""
    if device.type == "cpu":
        return False
    A = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(A, A, out_dtype=torch.float32)
        torch.bmm(A.unsqueeze(0), A.unsqueeze(0), out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


_thread = local()


@contextmanager
def flags_left() -> Iterator[None]:
    """Let `precision` leave torch's flags alone in this thread: they are the process's, and another may hold them."""
    _thread.leaves_flags = True
    try:
        yield
    finally:
        _thread.leaves_flags = False


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """Let products of fp32 matrices on CUDA be "ieee" or "tf32"; any other kind leaves torch's flag as it is."""
    if kind not in ("ieee", "tf32") or getattr(_thread, "leaves_flags", False):
        yield
        return
    flags = torch.backends.cuda.matmul
    name, value = ("fp32_precision", kind) if hasattr(flags, "fp32_precision") else ("allow_tf32", kind == "tf32")
    before = getattr(flags, name)
    if before == value:
        yield
        return
    setattr(flags, name, value)
    try:
        yield
    finally:
        setattr(flags, name, before)


def left_factor(P: Tensor, kind: str) -> Tensor:
    """Return what is multiplied in the place of P (..., m, r): for bf16x2 its two halves, (..., m, 2r)."""
    if kind == "bf16":
        return P.bfloat16()
    if kind != "bf16x2":
        return P
    halves = torch.empty(*P.shape[:-1], 2 * P.shape[-1], dtype=torch.bfloat16, device=P.device)
    high, low = halves.chunk(2, dim=-1)
    high.copy_(P)
    torch.sub(P, high, out=low)
    return halves


def multiply_(out: Tensor, A: Tensor, G: Tensor, kind: str) -> None:
    """Fill `out` (..., k, n), fp32, with A^T G for a left factor A (..., m, k)."""
    if rounds(kind):
        _product_of_bf16(A.mT, G, out)
        return
    if kind == OWN:
        torch.matmul(A.mT, G.float(), out=out)
        return
    with precision(kind):
        torch.matmul(_rounded(A, kind).mT, _rounded(G, kind), out=out)


def joined(product: Tensor, kind: str) -> Tensor:
    """Return R (..., r, n) from the product with the left factor."""
    if kind != "bf16x2":
        return product
    high, low = product.chunk(2, dim=-2)
    return high + low


def expand(P: Tensor, Z: Tensor, like: Tensor, kind: str) -> Tensor:
    """Return P Z lying in memory as `like` (m, n) does: in bf16 where the factors are rounded to it, else in fp32."""
    if rounds(kind):
        if like.device.type != "cpu" or has_bf16_product():
            out = torch.empty_like(like, dtype=torch.bfloat16)
            return torch.matmul(P.to(torch.bfloat16), Z.to(torch.bfloat16), out=out)
        return torch.matmul(
            _rounded(P, kind), _rounded(Z, kind), out=torch.empty_like(like, dtype=torch.float32)
        ).bfloat16()
    out = torch.empty_like(like, dtype=torch.float32)
    with precision(kind):
        return torch.matmul(_rounded(P, kind), _rounded(Z, kind), out=out)


def add_(W: Tensor, P: Tensor, Z: Tensor, *, beta: float, alpha: float, kind: str) -> None:
    """W <- beta W + alpha P Z for an fp32 matrix, or a stack of them; P Z rounded to bf16 if P and Z are in it."""
    if kind == OWN and W.dim() == 2:
        W.addmm_(P, Z, beta=beta, alpha=alpha)
        return
    if P.dtype == torch.bfloat16:
        kernels.scaled_(W, beta).add_(expand(P, Z, W, kind), alpha=alpha)
        return
    P, Z = _rounded(P, kind), _rounded(Z, kind)
    with precision("tf32" if rounds(kind) else kind):  # what is rounded to bf16 loses nothing in TF32
        if W.dim() == 2:
            W.addmm_(P, Z, beta=beta, alpha=alpha)
        else:
            P = P.expand(*W.shape[:-2], *P.shape[-2:])  # a stack may share one
            W.flatten(0, -3).baddbmm_(P.flatten(0, -3), Z.flatten(0, -3), beta=beta, alpha=alpha)


def _product_of_bf16(A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """out <- A B, factors rounded to bf16, sums in fp32."""
    A, B = A.to(torch.bfloat16), B.to(torch.bfloat16)
    if A.dim() == B.dim() in (2, 3) and has_mixed_product(A.device):
        multiply = torch.mm if A.dim() == 2 else torch.bmm
        return multiply(A, B, out_dtype=torch.float32, out=out)
    if A.device.type == "cpu" and has_bf16_product():
        return out.copy_(A @ B)
    with precision("tf32"):
        return torch.matmul(A.float(), B.float(), out=out)


def _rounded(X: Tensor, kind: str) -> Tensor:
    """Return fp32 numbers as they are multiplied."""
    if rounds(kind):
        return X.to(torch.bfloat16).float()
    X = X.float()
    if kind != "tf32" or X.device.type == "cuda":  # which rounds by itself
        return X
    bits = X.view(torch.int32)
    even = bits.bitwise_right_shift(13).bitwise_and_(1)
    return bits.add(0xFFF).add_(even).bitwise_and_(-(2**13)).view(torch.float32)
