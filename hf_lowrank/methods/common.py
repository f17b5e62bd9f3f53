"""Options that groups have whatever their method. Reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from hf_lowrank.methods import options as opt
from hf_lowrank.methods.registry import TRANSPORTS


OFFLOAD = "offload"
"""The layerwise mode in which whole gradients wait in host memory."""


@dataclass(frozen=True)
class SharedOptions:
    """Options of every group."""

    seed: int = opt.integer(0, minimum=0, help="seed of the private generators")
    correct_bias: bool = opt.flag(True, help="Adam's bias correction")
    eps_place: str = opt.choice(
        "torch",
        "released",
        help="where Adam's eps is added: to the corrected sqrt(V), as torch.optim.AdamW does, or to the uncorrected "
        "one, as the code that GaLore and Fira released does",
    )
    stochastic_rounding: bool = opt.flag(True, help="write bf16/fp16 weights by stochastic rounding, else to nearest")
    state_format: str = opt.choice("fp32", "8bit", "4bit", help="number format of the moments of matrices")
    basis_format: str = opt.choice("fp32", "bf16", "8bit", "4bit", help="number format of the bases")
    shard_basis: bool = opt.flag(
        False, help="sharded weights: keep a piece of every basis on each process too, and gather it in the step"
    )
    dense_state_format: str = opt.choice("fp32", "8bit", help="number format of the moments of dense parameters")
    layerwise: bool | str = opt.switch(
        False,
        word=OFFLOAD,
        help="free every gradient during backward; offload: let it wait in host memory for the step; see "
        "LowRankOptimizer.train",
    )
    max_grad_norm: float = opt.number(
        0.0, help="clip by the global norm of the projected gradients, or of whole ones with layerwise=offload; 0: off"
    )


@dataclass(frozen=True)
class ReplicaOptions:
    """Options of the whole optimizer under DistributedDataParallel: of LowRankOptimizer itself, or of `optim_args`."""

    shard_state: bool = opt.flag(False, help="each process keeps the state of the parameters that it owns")


@dataclass(frozen=True)
class LowRankOptions:
    """Options of every group of matrices."""

    rank: float = opt.rank(128, help="dimension of the subspace; clamped to the matrix's short side")
    update_proj_gap: int = opt.integer(200, minimum=1, help="steps between refreshes of the subspace")
    scale: float = opt.number(0.25, above=0.0, below=1e9, help="factor alpha on the low-rank update")
    proj_type: str = opt.choice(
        "std",
        "paper",
        "reverse_std",
        "left",
        "right",
        "full",
        help="which side of the weight is projected; full: both",
    )
    products: str = opt.choice(
        "auto",
        "ieee",
        "tf32",
        "bf16x2",
        "bf16",
        help="precision of the two products of a step: ieee (fp32), tf32, bf16, or bf16x2, where the basis is two "
        "numbers of bf16; auto: bf16x2 for bf16 weights where the device has kernels for it (a CPU's round R too), "
        "else fp32, or TF32 where torch is told so",
    )
    stable_spam: bool = opt.flag(
        False, help="Stable-SPAM: clip the spikes of every gradient and level its norm before anything looks at it"
    )
    on_refresh: str = opt.choice(*TRANSPORTS, help="what happens to the moments at a refresh")
    stagger: bool | str = opt.switch(
        help="spread the refreshes of the matrices evenly over the interval; auto: on an accelerator, unless they "
        "cost nothing, and in the layerwise mode",
    )
    reduce_projected: bool = opt.flag(
        False, help="under DistributedDataParallel, average projected gradients over the processes, not whole ones"
    )
