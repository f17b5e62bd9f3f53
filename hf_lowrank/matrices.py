"""How a weight becomes a matrix seen wide. The only file that knows orientation and batch dimensions."""

from __future__ import annotations

from torch import Tensor


PROJ_TYPES = ("std", "paper", "reverse_std", "left", "right")


def is_transposed(rows: int, columns: int, proj_type: str) -> bool:
    """Tell whether the wide view of a (rows, columns) weight is its transpose.

    `std` puts the short side first and sends square weights right (transposed), as all released code does; `paper`
    sends them left; `reverse_std` puts the long side first; `left` and `right` do not look at the shape.
    """
    return {
        "std": rows >= columns,
        "paper": rows > columns,
        "reverse_std": rows < columns,
        "left": False,
        "right": True,
    }[proj_type]


def wide(tensor: Tensor, proj_type: str) -> Tensor:
    """Return the view (..., m, n) of a weight or gradient; leading dimensions (experts) are a batch of matrices."""
    rows, columns = tensor.shape[-2:]
    return tensor.mT if is_transposed(rows, columns, proj_type) else tensor


def clamp_rank(rank: float, m: int, n: int) -> int:
    """Return r for an (m, n) matrix: `rank` itself or, below 1, that fraction of the short side; in 1 .. min(m, n)."""
    short = min(m, n)
    return min(short, int(rank) if rank >= 1 else max(1, round(rank * short)))
