"""The published packages, run as they are; one that is not installed or does not run is noted, never an error."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from contestants import LR, SCALE, Contestant, Runner, Setup
from torch import nn


Parameters = list[nn.Parameter]

GALORE_TORCH, FIRA, APOLLO = "galore-torch GaLoreAdamW", "fira FiraAdamW", "apollo-torch APOLLOAdamW"
ADAMW, ADAMW_8BIT = "torch AdamW (fused)", "bitsandbytes AdamW8bit"


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
