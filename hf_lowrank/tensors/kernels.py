"""fp32 kernels on matrices seen wide, (..., m, n): bases, signs, sampling, norms.

Legend: G gradient (..., m, n) · P basis (..., m, r) · C change of basis (..., r, r) · U left singular vectors (..., m,
k) · sigma singular values (..., k), descending. Every function accepts leading batch dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_lowrank.tensors.random import float64, with_float64


BLOCK = 2**18
"""Elements of the largest fp32 copy made of a low-precision weight or gradient on the CPU."""


BLOCK_ON_DEVICE = 2**26
"""The same on an accelerator, which small kernels keep waiting: 256 MiB, so that nearly every matrix is one block."""


CACHED = 2**17
"""Elements of a block that stays in a processor's cache."""


def blocks(X: Tensor, limit: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (start, length) along the last axis of X: blocks of at most `limit` elements, at least one column.

    The default limit is that of X's device.
    """
    size = X.shape[-1]
    if limit is None:
        limit = BLOCK if X.device.type == "cpu" else BLOCK_ON_DEVICE
    length = max(1, limit * size // max(1, X.numel()))
    for start in range(0, size, length):
        yield start, min(length, size - start)


def piece(X: Tensor, start: int, length: int) -> Tensor:
    """Return columns of X (..., n): X itself if those are all."""
    return X if length == X.shape[-1] else X.narrow(-1, start, length)


def scaled_(W: Tensor, beta: float) -> Tensor:
    """W <- beta W, which is nothing to do where weights do not decay."""
    return W if beta == 1.0 else W.mul_(beta)


def column_squared_norms(G: Tensor | Sequence[Tensor]) -> Tensor:
    """Return ||G_j||^2 of every column, (..., n), in fp32, with at most a small block as temporary.

    Of several matrices of one shape: stacked.
    """
    if not isinstance(G, Tensor):
        return torch.stack([column_norms(one) for one in G]).square_()
    if _in_one_pass(G):
        return column_norms(G).square_()
    if G.numel() <= CACHED:
        return G.float().square().sum(-2)
    if G.stride(-2) == 1:
        return torch.cat([G.narrow(-1, *block).float().square().sum(-2) for block in blocks(G, CACHED)], -1)
    squares = torch.zeros(*G.shape[:-2], G.shape[-1], dtype=torch.float32, device=G.device)
    for block in blocks(G.mT, CACHED):  # of rows, which lie in one piece
        squares.add_(G.narrow(-2, *block).float().square().sum(-2))
    return squares


def squared_norm(G: Tensor) -> Tensor:
    """Return ||G||_F^2 of every matrix in the batch, (...,), in fp32."""
    if G.dim() == 2 and G.dtype == torch.float32:  # of bf16 the other sum keeps 8 bits only
        return sum_of_squares(G)
    return column_squared_norms(G).sum(-1)


def sum_of_squares(x: Tensor) -> Tensor:
    """Return the sum of squares of all elements in fp32, without a copy of x; of a bf16 x with 8 bits of precision."""
    if x.dtype == torch.float32 and x.numel() < 2**31:
        flat = (x if x.is_contiguous() or x.dim() < 2 else x.mT).reshape(-1)
        return torch.dot(flat, flat)
    # the norm is accumulated in fp32; fp16 could not hold it, bf16 can
    norm: Tensor = torch.linalg.vector_norm(x, dtype=None if x.dtype == torch.bfloat16 else torch.float32)
    return norm.float().square()


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm of every tensor, as fp32 where that is free: many at once on an accelerator, without a copy."""
    if tensors and tensors[0].device.type != "cpu":
        found: list[Tensor] = [torch.empty(0)] * len(tensors)
        for kind in dict.fromkeys((x.device, x.dtype) for x in tensors):
            which = [i for i, x in enumerate(tensors) if (x.device, x.dtype) == kind]
            some = torch._foreach_norm([tensors[i] for i in which], 2, dtype=torch.float32)
            for i, norm in zip(which, some, strict=True):
                found[i] = norm
        return found
    # accumulated in fp32: fp16 could not hold a norm, bf16 can
    return [torch.linalg.vector_norm(x, dtype=None if x.dtype == torch.bfloat16 else torch.float32) for x in tensors]


def gram_basis(G: Tensor) -> tuple[Tensor, Tensor]:
    """Return all left singular vectors U (..., m, k) and values sigma (..., k), k = min(m, n), from the smaller Gram
    matrix.

    The eigenvectors of G G^T are U and its eigenvalues sigma^2. Squares of what decays to 1e-4 are lost in fp32, so
    this is done in float64, which resolves singular values down to 1e-6 of the largest, and neighbours whose squares
    differ by 1e-12 of the largest square: what is smaller is the rounding of an fp32 gradient. A tall G goes through
    G^T G and U = G V / sigma. Where a device has no float64 (MPS) the CPU does it. A lack of memory is raised, not
    answered with a larger attempt.

    Raises:
        ValueError: if neither this nor a full SVD converges, which a finite gradient does not cause.
    """
    for decompose in (_gram_eigh, svd_basis):
        try:
            return decompose(G)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
    raise ValueError(f"no decomposition of a gradient of shape {tuple(G.shape)} succeeded; is it finite?")


def _gram_eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigendecomposition of the Gram matrix on the short side of G."""
    wide = G.shape[-2] <= G.shape[-1]
    short = G if wide else G.mT
    gram = torch.zeros(1, dtype=torch.float64, device=with_float64(G.device))
    for block in blocks(short):
        X = short.narrow(-1, *block).to(gram)
        gram = gram + X @ X.mT
    values, vectors = torch.linalg.eigh(gram)
    sigma, vectors = values.flip(-1).clamp_min(0).sqrt(), vectors.flip(-1)
    U = vectors if wide else orthonormalize(G.to(gram) @ vectors)
    return _rounded(U, G), _rounded(sigma, G)


def svd_basis(G: Tensor) -> tuple[Tensor, Tensor]:
    """Return all left singular vectors and values of G by a full singular value decomposition in float64."""
    U, sigma, _ = torch.linalg.svd(float64(G), full_matrices=False)
    return _rounded(U, G), _rounded(sigma, G)


def _rounded(X: Tensor, like: Tensor) -> Tensor:
    return X.to(like.device, torch.float32)


def range_finder(
    G: Tensor, r: int, gen: torch.Generator, *, oversample: int = 8, iterations: int = 2
) -> tuple[Tensor, Tensor]:
    """Randomized SVD: leading r left singular vectors and values of G.

    References:
        Halko, Martinsson, Tropp: Finding structure with randomness (2011), algorithms 4.4 and 5.1.
    """
    G = G.float()
    k = min(r + oversample, *G.shape[-2:])
    where = with_float64(G.device)
    sketch = torch.randn(*G.shape[:-2], G.shape[-1], k, generator=gen, dtype=torch.float32, device=where).to(G)
    Q = orthonormalize(G @ sketch)
    for _ in range(iterations):
        Q = orthonormalize(G @ orthonormalize(G.mT @ Q))
    U, sigma = gram_basis(Q.mT @ G)
    return Q @ U[..., :r], sigma[..., :r]


def power_step(G: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration on G G^T, warm-started at P: G G^T P = Q R.

    Repeated, it brings the columns of Q to the leading singular vectors, in their order; one step moves each of them
    little from the slot it has.

    Returns:
        Q (..., m, r), and estimates of the r largest singular values of G, (..., r), which are the roots of the
        diagonal of R if the columns of P are the leading vectors; the largest is an estimate from below.
    """
    G = G.float()
    Q, R = torch.linalg.qr(G @ (G.mT @ P))
    return Q, R.diagonal(dim1=-2, dim2=-1).abs().sqrt().sort(descending=True).values


def orthonormalize(X: Tensor) -> Tensor:
    """Return an orthonormal basis of X's columns by Householder QR.

    Not by Cholesky QR: on real gradients the columns are too close to dependent for it in fp32.
    """
    Q: Tensor = torch.linalg.qr(X)[0]
    return Q


def replace_(P: Tensor, new: Tensor, *, first: bool) -> None:
    """P <- new, columns flipped so that diag(new^T P) >= 0; those of the first basis so that each largest entry is
    positive.

    Singular vectors are defined up to sign. Moments that are kept across a refresh belong to a slot, so a sign that
    flips at random would turn them around.
    """
    pivot = new.gather(-2, new.abs().argmax(-2, keepdim=True)) if first else (new * P).sum(-2, keepdim=True)
    torch.mul(new, torch.where(pivot < 0, -1.0, 1.0), out=P)


def take_columns(U: Tensor, index: Tensor) -> Tensor:
    """Return the columns `index` (..., r) of U (..., m, k) as (..., m, r)."""
    return U.gather(-1, index.unsqueeze(-2).expand(*U.shape[:-1], index.shape[-1]))


def overlap(C: Tensor) -> Tensor:
    """Return ||U^T V||_F^2 / r for the change of basis C = U^T V, averaged over the batch.

    References:
        I3S, arXiv 2502.05790, section 4.4, eq. 3.
    """
    return C.square().sum((-2, -1)).mean() / C.shape[-1]


def divisor(norm: Tensor) -> Tensor:
    """Return norms, or their squares, to divide by, in a new tensor: zeros stay zeros."""
    return torch.where(norm > 0, norm, torch.inf)


def column_norms(R: Tensor) -> Tensor:
    """Return the Euclidean norm of every column of R (..., r, n), (..., n), in fp32."""
    if _in_one_pass(R):
        norms: Tensor = torch.linalg.vector_norm(R, dim=-2, dtype=torch.float32)
        return norms
    return column_squared_norms(R).sqrt_()


def _in_one_pass(G: Tensor) -> bool:
    """Tell whether a reduction over rows reads once, with no temporary: an accelerator casts as it reads."""
    return G.device.type != "cpu" or (G.dtype == torch.float32 and G.stride(-2) == 1)
