"""What low-rank optimizers are compared with, by one flag: --baseline adamw | adamw_8bit | lora | relora | low_rank.

adamw and adamw_8bit are values of --optim under a name that stays the same. peft holds LoRA. What peft lacks is here:
ReLoRA, and low-rank factorisation from scratch. A recipe needs three names:

    parser = HfArgumentParser((..., BaselineArguments, TrainingArguments))
    callbacks = prepare_(model, baseline_args, training_args)   # before the Trainer is made
    trainer = Trainer(model, training_args, callbacks=callbacks, ...)
    trainer.train(); to_plain_(model)                           # merged: an ordinary model to save and load

Adapters are put into the model itself, not around it. So the Trainer's checkpoints hold the whole state dict: the base
weights (which ReLoRA changes at every merge, and which a model trained from scratch has nowhere else), the adapters,
and what trains beside them. A peft wrapper would save the adapters alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

import hf_lowrank


ADAPTER = "default"
"""peft's name of the one adapter there is."""

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}
"""peft's options for them: arXiv 2106.09685, 2312.03732, 2402.09353, 2404.02948, 2406.01775."""

_ADAPTER_WEIGHT = re.compile(r"\.lora_([AB]|magnitude_vector)\.|\.(down|up)_factor\.")


@dataclass
class BaselineArguments:
    """Which baseline, and its hyper-parameters. The defaults are those of the pretraining tables (GaLore, App. C)."""

    baseline: Literal["adamw", "adamw_8bit", "lora", "relora", "low_rank"] | None = field(
        default=None, metadata={"help": "Train this instead of the low-rank optimizer that --optim names."}
    )
    adapter_kind: str = field(default="lora", metadata={"help": f"lora, relora: {', '.join(KINDS)}."})
    adapter_rank: int = field(default=128, metadata={"help": "lora, relora, low_rank: rank of the factors."})
    adapter_alpha: float = field(default=32.0, metadata={"help": "lora, relora: W0 + (alpha / rank) B A."})
    adapter_dropout: float = field(default=0.05, metadata={"help": "lora, relora: dropout before A."})
    adapter_targets: str | None = field(
        default=None,
        metadata={
            "help": "lora, relora, low_rank: modules, as --optim_target_modules spells them. Default: those that a "
            "low-rank optimizer would project."
        },
    )
    relora_every: int = field(default=1000, metadata={"help": "relora: steps from one merge to the next."})
    relora_warmup: int = field(default=50, metadata={"help": "relora: steps of warm-up after a merge."})


def prepare_(
    model: nn.Module, args: BaselineArguments, training_args: TrainingArguments, *, also_train: str = ".*"
) -> list[TrainerCallback]:
    """Turn a model and its training arguments into those of a baseline, in place.

    Args:
        model: a PreTrainedModel; with lora, relora and low_rank its targets are replaced.
        args: which baseline; with None nothing happens.
        training_args: `optim` becomes a dense AdamW where it names a low-rank optimizer.
        also_train: lora, relora: regular expression, searched in names, of the parameters outside the adapters that
            train too. The weights under the adapters never do.

    Returns:
        What `Trainer(callbacks=...)` needs.

    Raises:
        ValueError: if the targets match nothing, or a number is out of range.
    """
    if args.baseline is None:
        return []
    if args.baseline in ("adamw", "adamw_8bit") or _is_low_rank(training_args.optim):
        training_args.optim = OptimizerNames(
            "adamw_bnb_8bit" if args.baseline == "adamw_8bit" else "adamw_torch_fused"
        )
    training_args.optim_args = training_args.optim_target_modules = None
    if args.baseline in ("adamw", "adamw_8bit"):
        return []
    if args.adapter_kind not in KINDS:
        raise ValueError(f"--adapter_kind must be one of {', '.join(KINDS)}, not {args.adapter_kind!r}")
    if (args.baseline, args.adapter_kind) == ("relora", "dora"):
        raise ValueError("relora merges factors, and DoRA's norms would change with them: set another --adapter_kind")
    if args.adapter_rank < 1:
        raise ValueError(f"--adapter_rank must be at least 1, not {args.adapter_rank}")
    targets = _targets(model, args)
    if args.baseline == "low_rank":
        factorize_(model, targets, rank=args.adapter_rank)
        return []
    add_lora_(model, targets, args, also_train=also_train)
    return [ReLoRACallback(args.relora_every, args.relora_warmup)] if args.baseline == "relora" else []


def to_plain_(model: nn.Module) -> None:
    """Merge what `prepare_` put into a model, in fp32, so that it is an ordinary one again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            plain = module.get_base_layer()
            dtype = plain.weight.dtype
            module.float().merge(adapter_names=[ADAPTER])
            plain.to(dtype)
        elif isinstance(module, FactorizedLinear):
            plain = module.product()
        else:
            continue
        model.set_submodule(name, plain)


def adapter_parameters(model: nn.Module) -> list[str]:
    """Return the names of the factors that stand in for matrices: LoRA's, and those of `factorize_`."""
    return [name for name, p in model.named_parameters() if p.requires_grad and _ADAPTER_WEIGHT.search(name)]


def add_lora_(model: nn.Module, targets: list[str], args: BaselineArguments, *, also_train: str) -> None:
    """Put peft's LoRA layers into a model; base weights are frozen, and what `also_train` does not find."""
    config = LoraConfig(
        r=args.adapter_rank,
        lora_alpha=args.adapter_alpha,
        lora_dropout=args.adapter_dropout,
        target_modules=targets,
        **KINDS[args.adapter_kind],
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, p in model.named_parameters():
        if not _ADAPTER_WEIGHT.search(name):
            p.requires_grad = ".base_layer." not in name and re.search(also_train, name) is not None


class ReLoRACallback(TrainerCallback):
    """Merges the adapters into the base every `every` steps and starts new ones (ReLoRA, arXiv 2307.05695).

    At a merge W0 <- W0 + (alpha / r) B A, A is drawn anew, B is zero: the model computes what it did before. The
    optimizer's state of the factors starts anew too (the authors' code zeroes 99.9 % of it at random). The learning
    rate then rises linearly, within `warmup` steps, to where the schedule of --lr_scheduler_type is by that time: with
    a cosine that is the paper's jagged cosine. There is no full-rank warm start; the tables of the low-rank papers
    have none either.

    New factors come from a generator keyed by (seed, step), the same on every process and in a run that is resumed.

    Args:
        every: steps from one merge to the next; best a divisor of the number of steps.
        warmup: steps of warm-up after a merge.
    """

    def __init__(self, every: int, warmup: int) -> None:
        if not 0 <= warmup < every:
            raise ValueError(f"--relora_warmup must be at least 0 and below --relora_every, not {warmup} and {every}")
        self.every = every
        self.warmup = warmup

    def on_train_begin(self, args: TrainingArguments, *unused: Any, lr_scheduler: Any, **kwargs: Any) -> None:
        """Give the schedule its teeth."""
        if not isinstance(lr_scheduler, LambdaLR):
            raise ValueError(f"relora needs a schedule by steps; --lr_scheduler_type {args.lr_scheduler_type} is none")
        multipliers = lr_scheduler.lr_lambdas
        lr_scheduler.lr_lambdas = [jagged(f, every=self.every, warmup=self.warmup) for f in multipliers]

    def on_step_end(
        self, args: TrainingArguments, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Merge and restart where it is due. A checkpoint of this step is written after it, and so holds the merge."""
        if state.global_step % self.every == 0:
            factors = merge_and_restart_(model, seed=1_000_003 * args.seed + state.global_step)
            states = getattr(optimizer, "optimizer", optimizer).state  # accelerate wraps it
            for p in factors:
                reset_(states[p])


@torch.no_grad()
def merge_and_restart_(model: nn.Module, *, seed: int) -> list[Tensor]:
    """Add every adapter to its base weight and start a new one: A uniform as nn.Linear's weight, B zero.

    Returns:
        The factors, the same parameters as before.
    """
    generator = torch.Generator().manual_seed(seed)
    factors: list[Tensor] = []
    for layer in _lora_layers(model):
        _add_(layer.get_base_layer().weight, layer.get_delta_weight(ADAPTER))
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # (r, in), (out, r)
        bound = A.shape[1] ** -0.5
        A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
        B.zero_()
        factors += [A, B]
    return factors


def reset_(state: dict[str, Any]) -> None:
    """Put the state of one parameter back to its beginning, in place, so that every key stays where it is.

    Known: torch's AdamW, bitsandbytes' (its 8-bit moments are code x absmax, and `qmap` is the codes' meaning) and
    hf_lowrank's.
    """
    for key, value in state.items():
        if not isinstance(value, Tensor):
            state[key] = 0  # the number of steps
        elif not key.startswith("qmap"):
            value.zero_()


def jagged(multiplier: Callable[[int], float], *, every: int, warmup: int) -> Callable[[int], float]:
    """Return a learning rate multiplier that follows another one, with a linear warm-up after every merge.

    With w = warmup, K = every and k the steps since the last merge (the first K steps have none): k / w times
    the multiplier at the end of this warm-up where k < w, else the multiplier itself.
    """

    def with_restarts(step: int) -> float:
        since = step % every
        if step < every or since >= warmup:
            return multiplier(step)
        return since / warmup * multiplier(step - since + warmup)

    return with_restarts


class FactorizedLinear(nn.Module):
    """y = B A x + b: a linear layer whose weight has rank r because it is never anything but a product.

    The factors start as the best approximation of the layer's weight, B = U sqrt(S) and A = sqrt(S) V^T with its r
    leading singular triples ("spectral initialisation", arXiv 2209.13569).

    Args:
        linear: the layer to replace.
        rank: r, at most the short side.
    """

    def __init__(self, linear: nn.Linear, *, rank: int) -> None:
        super().__init__()
        weight = linear.weight.detach()
        rank = min(rank, *weight.shape)
        options = {"device": weight.device, "dtype": weight.dtype}
        self.down_factor = nn.Linear(linear.in_features, rank, bias=False, **options)
        self.up_factor = nn.Linear(rank, linear.out_features, bias=linear.bias is not None, **options)
        U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
        root = S[:rank].sqrt()
        with torch.no_grad():
            self.down_factor.weight.copy_(root[:, None] * Vh[:rank])  # (r, in)
            self.up_factor.weight.copy_(U[:, :rank] * root)  # (out, r)
            if linear.bias is not None:
                self.up_factor.bias.copy_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return B A x + b. Shapes: (..., in) -> (..., out)."""
        return self.up_factor(self.down_factor(x))

    def product(self) -> nn.Linear:
        """Return the ordinary layer with the weight B A."""
        B, A = self.up_factor.weight, self.down_factor.weight
        linear = nn.Linear(A.shape[1], B.shape[0], bias=False, device=A.device, dtype=A.dtype)
        linear.weight = nn.Parameter((B.detach().float() @ A.detach().float()).to(A.dtype))
        linear.bias = self.up_factor.bias
        return linear


def factorize_(model: nn.Module, targets: list[str], *, rank: int) -> None:
    """Replace linear layers by products of two factors, all of them trainable."""
    for name in targets:
        if not isinstance(module := model.get_submodule(name), nn.Linear):
            raise ValueError(f"--baseline low_rank replaces nn.Linear alone; {name} is a {type(module).__name__}")
        model.set_submodule(name, FactorizedLinear(module, rank=rank))


def _targets(model: nn.Module, args: BaselineArguments) -> list[str]:
    """Return the names of the modules to adapt, by the rule that chooses matrices for a low-rank optimizer."""
    found = hf_lowrank.target_parameters(model, rank=1, target_modules=args.adapter_targets)
    return [name.removesuffix(".weight") for name in found]


def _is_low_rank(optim: Any) -> bool:
    name = str(getattr(optim, "value", optim)).removesuffix("_layerwise").removesuffix("_8bit")
    return name in hf_lowrank.METHODS


def _lora_layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def _add_(weight: Tensor, delta: Tensor) -> None:
    """Add in fp32; a weight in bf16 rounds once."""
    weight.copy_(weight.float() + delta.float())
