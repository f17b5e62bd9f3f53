"""What is timed: the floors, hf_lowrank's optimizers, and the published packages.

Those are run as they are; one that is not installed or does not run is noted, never an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import Problem
from torch import Tensor, nn

from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.methods import resolve


LR = 1e-6
SCALE = 0.25
PRODUCTS, FLOOR = "floor: the two products", "floor: products + fused AdamW on the dense part"
FIRA_FLOOR = "floor of Fira: + norms, scaled gradient"
APOLLO_FLOOR = "floor of APOLLO: one product, norms, scaled gradient"

GALORE_TORCH, FIRA, APOLLO = "galore-torch GaLoreAdamW", "fira FiraAdamW", "apollo-torch APOLLOAdamW"
ADAMW, ADAMW_8BIT = "torch AdamW (fused)", "bitsandbytes AdamW8bit"

OURS = (
    "galore_dominant_adamw",
    "galore_i3s_adamw",
    "fira_adamw",
    "fira_i3s_adamw",
    "apollo_random_adamw",
    "apollo_mini_adamw",
    "subtrack_adamw",
    "ldadam",
    "galore_i3s_adamw_8bit",
    "galore_i3s_adamw_8bit_layerwise",
)
"""Measured by default."""


@dataclass(frozen=True)
class Setup:
    """Rank and steps between refreshes, and further options of ours."""

    rank: int
    gap: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Runner:
    """A step function, and the optimizer whose state counts."""

    step: Callable[[], object]
    optimizer: Any = None


Parameters = list[nn.Parameter]
Make = Callable[[Parameters, Parameters, Setup], Runner]
Kernels = Callable[[Tensor, Tensor, Tensor, Tensor], object]


@dataclass(frozen=True)
class Contestant:
    """One optimizer by name."""

    name: str
    make: Make
    kind: str = "ours"  # or "peer", "floor"

    def start(self, problem: Problem, setup: Setup) -> Runner:
        """Return it with parameters of its own on the memory of the problem."""
        return self.make(*problem.parameters(), setup)


def bare(kernels: Kernels) -> Make:
    """Return an optimizer that does nothing but `kernels` of W, G, P and N, seen wide, for every matrix."""

    def make(matrices: Parameters, dense: Parameters, setup: Setup) -> Runner:
        wide = [(p.data.mT, _grad(p).mT) if p.shape[0] >= p.shape[1] else (p.data, _grad(p)) for p in matrices]
        bases = [_basis(w, setup.rank) for w, _ in wide]
        directions = [torch.randn(P.shape[1], w.shape[1]).to(w) for (w, _), P in zip(wide, bases, strict=True)]

        def step() -> None:
            for (W, G), P, N in zip(wide, bases, directions, strict=True):
                kernels(W, G, P, N)

        return Runner(step)

    return make


def products(W: Tensor, G: Tensor, P: Tensor, N: Tensor) -> None:
    """R = P^T G and W += P N: what every method with a dense basis must do at every step."""
    torch.mm(P.mT, G)
    W.addmm_(P, N, alpha=-LR)


def fira_kernels(W: Tensor, G: Tensor, P: Tensor, N: Tensor) -> None:
    """What Fira must do at every step: both products, column norms of G, R and N, the gradient added by columns."""
    apollo_kernels(W, G, P, N)
    W.addmm_(P, N, alpha=-LR)


def apollo_kernels(W: Tensor, G: Tensor, P: Tensor, N: Tensor) -> None:
    """What APOLLO must do at every step: R = P^T G, column norms of G, R and N, the gradient added by columns."""
    R = torch.mm(P.mT, G)
    _squared_norms(G)
    d = (_squared_norms(N) / _squared_norms(R)).sqrt_()
    W.addcmul_(G, d.unsqueeze(0), value=-LR)


def _squared_norms(X: Tensor) -> Tensor:
    """Return those of the columns by the faster of torch's two ways."""
    if X.stride(-2) == 1:
        norms: Tensor = torch.linalg.vector_norm(X, dim=-2)
        return norms.square_()
    return X.square().sum(-2)


def with_adamw(kernels: Kernels) -> Make:
    """Return the kernels, and torch's fused AdamW on everything that is not projected."""

    def make(matrices: Parameters, dense: Parameters, setup: Setup) -> Runner:
        adamw = torch.optim.AdamW(dense, lr=LR, weight_decay=0.0, fused=True)
        kernels_step = bare(kernels)(matrices, dense, setup).step

        def step() -> None:
            kernels_step()
            adamw.step()

        return Runner(step, adamw)

    return make


def _grad(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


def _basis(W: Tensor, rank: int) -> Tensor:
    return torch.linalg.qr(torch.randn(W.shape[0], min(rank, W.shape[0])))[0].to(W)


def ours(name: str, **options: Any) -> Contestant:
    """Return one of our optimizers; `options` go before those of the setup. APOLLO-Mini has its own rank, 1."""
    own = {key: value for key, value in METHODS[resolve.split(name)[0]].defaults.items() if key == "rank"}

    def make(matrices: Parameters, dense: Parameters, setup: Setup) -> Runner:
        chosen = {"rank": setup.rank, "update_proj_gap": setup.gap, "stagger": False, **own, **options}
        chosen |= setup.options
        optimizer = LowRankOptimizer([{"params": matrices, **chosen}, {"params": dense}], name, lr=LR)
        return Runner(layerwise_step(optimizer) if "_layerwise" in name else optimizer.step, optimizer)

    label = ", ".join([name, *(f"{k}={v}" for k, v in options.items())])
    return Contestant(label, make)


def layerwise_step(optimizer: LowRankOptimizer) -> Callable[[], object]:
    """Return a step that hands over the gradients one by one, as the hooks do during backward."""
    places = [
        (g, i, p, p.grad) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])
    ]
    low_rank = [place for place in places if "rank" in optimizer.param_groups[place[0]]]

    def step() -> None:
        for g, i, p, grad in low_rank:
            p.grad = grad
            optimizer.take_gradient(g, i, p)
        optimizer.step()

    return step


FLOORS = (
    Contestant(PRODUCTS, bare(products), "floor"),
    Contestant(FLOOR, with_adamw(products), "floor"),
    Contestant(FIRA_FLOOR, with_adamw(fira_kernels), "floor"),
    Contestant(APOLLO_FLOOR, with_adamw(apollo_kernels), "floor"),
)


def _groups(matrices: Parameters, dense: Parameters, setup: Setup, **more: Any) -> list[dict[str, Any]]:
    keys = {"rank": setup.rank, "update_proj_gap": setup.gap, "scale": SCALE, "proj_type": "std"} | more
    return [{"params": dense}, {"params": matrices, **{k: v for k, v in keys.items() if v is not None}}]


def _run(optimizer: torch.optim.Optimizer) -> Runner:
    return Runner(optimizer.step, optimizer)


def adamw(matrices: Parameters, dense: Parameters, setup: Setup) -> Runner:
    """Make torch's fused AdamW on everything."""
    return _run(torch.optim.AdamW([*matrices, *dense], lr=LR, fused=True))


def adamw_8bit(matrices: Parameters, dense: Parameters, setup: Setup) -> Runner:
    """Make bitsandbytes' AdamW8bit."""
    from bitsandbytes.optim import AdamW8bit

    return _run(AdamW8bit([*matrices, *dense], lr=LR))


def galore_torch(matrices: Parameters, dense: Parameters, setup: Setup) -> Runner:
    """Make galore-torch's GaLoreAdamW."""
    from galore_torch import GaLoreAdamW

    return _run(GaLoreAdamW(_groups(matrices, dense, setup), lr=LR, no_deprecation_warning=True))


def fira(matrices: Parameters, dense: Parameters, setup: Setup) -> Runner:
    """Make fira's FiraAdamW; its name for the scale is alpha."""
    from fira import FiraAdamW

    return _run(
        FiraAdamW(_groups(matrices, dense, setup, alpha=SCALE, scale=None), lr=LR, no_deprecation_warning=True)
    )


def apollo(matrices: Parameters, dense: Parameters, setup: Setup) -> Runner:
    """Make apollo-torch's APOLLOAdamW with the paper's options."""
    from apollo_torch import APOLLOAdamW

    return _run(APOLLOAdamW(_groups(matrices, dense, setup, scale=1.0, proj="random", scale_type="channel"), lr=LR))


def apollo_mini(matrices: Parameters, dense: Parameters, setup: Setup) -> Runner:
    """Make apollo-torch's APOLLO-Mini: rank 1, one factor for the whole matrix."""
    from apollo_torch import APOLLOAdamW

    mini = {"rank": 1, "scale": 128.0, "proj": "random", "scale_type": "tensor"}
    return _run(APOLLOAdamW(_groups(matrices, dense, setup, **mini), lr=LR))


def q_galore(matrices: Parameters, dense: Parameters, setup: Setup) -> Runner:
    """Make q-galore-torch's optimizer; its step calls torch.cuda."""
    from q_galore_torch import QGaLoreAdamW8bit

    more = {"quant": True, "quant_n_bit": 4, "quant_group_size": 256, "cos_threshold": 0.4, "gamma_proj": 2}
    return _run(QGaLoreAdamW8bit(_groups(matrices, dense, setup, **more, queue_size=5), lr=LR))


def kozistr(name: str) -> Contestant:
    """Return GaLore or Fira of pytorch-optimizer."""

    def make(matrices: Parameters, dense: Parameters, setup: Setup) -> Runner:
        import pytorch_optimizer

        groups = _groups(matrices, dense, setup, projection_type="std", proj_type=None)
        return _run(getattr(pytorch_optimizer, name)(groups, lr=LR))

    return Contestant(f"pytorch-optimizer {name}", make, "peer")


AS_GALORE_TORCH = ours("galore_i3s_adamw", products="bf16", stochastic_rounding=False)
"""With factors and weights rounded as galore-torch rounds them where weights are in bf16; our moments stay in fp32."""

PEERS = (
    Contestant(ADAMW, adamw, "peer"),
    Contestant(ADAMW_8BIT, adamw_8bit, "peer"),
    Contestant(GALORE_TORCH, galore_torch, "peer"),
    Contestant(FIRA, fira, "peer"),
    Contestant(APOLLO, apollo, "peer"),
    Contestant("apollo-torch APOLLO-Mini", apollo_mini, "peer"),
    Contestant("q-galore-torch QGaLoreAdamW8bit", q_galore, "peer"),
    kozistr("GaLore"),
    kozistr("Fira"),
)


def quiet() -> None:
    """Silence what the packages say on import and at every step."""
    warnings.filterwarnings("ignore", module="fira|galore_torch|apollo_torch|q_galore_torch|bitsandbytes|torch.jit")
