"""Rows without a subspace beside bare kernels: what torch needs for the same update, in a loop with nothing around it.

    python recipes/benchmarks/whole.py [--size 130m] [--layers 2] [--rounds 20] [--device cpu]

Each row is interleaved with its bare kernels; the last one, Alice at rank 256 between refreshes, with Fira. Two ratios
are printed, medians over the rounds: to the kernels of the update alone, and to those with one norm of every gradient,
which the package reads to skip what is not finite.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from math import sqrt

import torch
from shapes import problem
from timing import Samples, milliseconds, ratio
from torch import Tensor

from hf_lowrank import LowRankOptimizer


Step = Callable[[], object]
LR, RANK = 1e-3, 256


def adamw(W: list[Tensor], G: list[Tensor]) -> Step:
    """torch's fused kernel on all tensors."""
    M, V = ([torch.zeros_like(w) for w in W] for _ in range(2))
    t = [torch.ones((), device=w.device) for w in W]
    numbers = {"lr": LR, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    return lambda: torch._fused_adamw_(W, G, M, V, [], t, amsgrad=False, maximize=False, **numbers)


def msgd(W: list[Tensor], G: list[Tensor]) -> Step:
    """Two passes over every tensor."""
    M = [torch.zeros_like(w) for w in W]

    def step() -> None:
        for w, g, m in zip(W, G, M, strict=True):
            w.sub_(m.lerp_(g, 0.1), alpha=LR)

    return step


def sgd(W: list[Tensor], G: list[Tensor]) -> Step:
    """One pass over every tensor."""
    return lambda: [w.sub_(g, alpha=LR) for w, g in zip(W, G, strict=True)]


def scale(W: list[Tensor], G: list[Tensor]) -> Step:
    """The norms of the outputs, and one pass."""

    def step() -> None:
        for w, g in zip(W, G, strict=True):
            w.addcmul_(g, sqrt(g.shape[1]) / torch.linalg.vector_norm(g, dim=1, keepdim=True), value=-LR)

    return step


def sinkgd(W: list[Tensor], G: list[Tensor]) -> Step:
    """Outputs and inputs normalised in turn, five times."""

    def step() -> None:
        for w, g in zip(W, G, strict=True):
            for _ in range(5):
                g = g / torch.linalg.vector_norm(g, dim=1, keepdim=True)
                g /= torch.linalg.vector_norm(g, dim=0, keepdim=True)
            w.sub_(g, alpha=LR * sqrt(g.shape[0]))

    return step


def racs(W: list[Tensor], G: list[Tensor]) -> Step:
    """Five steps of the fixed point by products with vectors, and the scaled gradient."""

    def step() -> None:
        for w, g in zip(W, G, strict=True):
            square, q = g.square(), torch.ones(g.shape[1], device=g.device)
            for _ in range(5):
                s = square @ q / q.dot(q)
                q = s @ square / s.dot(s)
            u = (g * q.rsqrt()).mul_(s.rsqrt().unsqueeze(1))
            w.sub_(u / u.norm(), alpha=LR)

    return step


def muon(W: list[Tensor], G: list[Tensor]) -> Step:
    """torch's own optimizer."""
    parameters = [torch.nn.Parameter(w) for w in W]
    for p, g in zip(parameters, G, strict=True):
        p.grad = g
    return torch.optim.Muon(parameters, lr=LR).step


def fira(W: list[Tensor], G: list[Tensor]) -> Step:
    """No bare kernels: the row that Alice is held against."""
    return package("fira_adamw", W, G, rank=RANK, update_proj_gap=10**6)


BARE: dict[str, Callable[[list[Tensor], list[Tensor]], Step]] = {
    "full_adamw": adamw,
    "full_msgd": msgd,
    "full_sgd": sgd,
    "scale_sgd": scale,
    "sinkgd": sinkgd,
    "racs": racs,
    "full_muon": muon,
    "alice_adamw": fira,
}


def package(name: str, W: Sequence[Tensor], G: Sequence[Tensor], **options: int) -> Step:
    """Return a step of the package on the same tensors."""
    parameters = [torch.nn.Parameter(w) for w in W]
    for p, g in zip(parameters, G, strict=True):
        p.grad = g
    return LowRankOptimizer([{"params": parameters, "rank": 1, **options}], name, lr=LR).step


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="130m")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pairs = problem(args.size, torch.float32, args.device, layers=args.layers).matrices
    W, G = [w for w, _ in pairs], [g for _, g in pairs]
    print(f"{args.size}, {args.layers} layers, fp32, {args.device}, {args.threads} threads, torch {torch.__version__}")
    print("| row | bare ms | ours ms | ratio | with one norm of every gradient |")
    print("|---|---:|---:|---:|---:|")
    norm = lambda: [torch.linalg.vector_norm(g) for g in G]  # noqa: E731
    for name, made in BARE.items():
        ours = {"rank": RANK, "update_proj_gap": 10**6} if name == "alice_adamw" else {}
        steps = {"bare": made(W, G), "ours": package(name, W, G, **ours), "norm": norm}
        taken = {key: Samples() for key in steps}
        for turn in range(args.rounds + 2):
            for key, step in steps.items():
                spent = milliseconds(step, args.device)
                if turn >= 2:
                    taken[key].values.append(spent)
        checked = Samples([a + b for a, b in zip(taken["bare"].values, taken["norm"].values, strict=True)])
        plain, _ = ratio(taken["ours"], taken["bare"])
        fair, spread = ratio(taken["ours"], checked)
        cells = f"{taken['bare'].median:.1f} | {taken['ours'].median:.1f} | {plain:.2f} | {fair:.2f} ({spread})"
        print(f"| `{name}` | {cells} |")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
