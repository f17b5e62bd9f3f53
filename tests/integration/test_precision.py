"""Mixed precision, compilation, weights on several devices: what Trainer may do around the optimizer."""

import pytest
import torch
from conftest import arguments, engine, tiny_llama, train
from streams import PLAIN
from torch import nn

from hf_lowrank import METHODS, LowRankOptimizer


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in PLAIN else pytest.mark.full) for name in METHODS]
)
def test_bf16_autocast_keeps_fp32_weights_and_state(name, tmp_path):
    t = train(arguments(tmp_path, name, bf16=True))
    assert all(p.dtype == torch.float32 for p in t.model.parameters())
    losses = [row["loss"] for row in t.state.log_history if "loss" in row]
    assert all(torch.isfinite(p).all() for p in t.model.parameters()) and len(losses) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_weights_train_with_fp32_moments(dtype, tmp_path):
    t = train(arguments(tmp_path, "fira_i3s_adamw"), tiny_llama(dtype))
    for p, s in engine(t).state.items():
        assert p.dtype == dtype and torch.isfinite(p).all()
        assert s["exp_avg"].dtype == s["exp_avg_sq"].dtype == torch.float32


def test_a_grad_scaler_skips_its_overflow_steps():
    torch.manual_seed(0)
    net = nn.Linear(8, 8)
    opt = LowRankOptimizer([{"params": [net.weight], "rank": 2}, {"params": [net.bias]}], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)  # overflows at first
    for _ in range(20):
        opt.zero_grad()
        scaler.scale(net(torch.ones(4, 8) * 1e3).square().mean()).backward()
        scaler.step(opt)
        scaler.update()
    taken = int(opt.state[net.weight]["step"])
    assert 0 < taken < 20 and int(opt.state[net.weight]["skipped"]) == 0  # the scaler skipped, not we
    assert torch.isfinite(net.weight).all()


def test_a_compiled_run_equals_the_plain_one_and_has_the_same_names(tmp_path):
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    t = train(arguments(tmp_path / "compiled", "galore_i3s_adamw", max_steps=4, **compiled))
    plain = train(arguments(tmp_path / "plain", "galore_i3s_adamw", max_steps=4))
    names = [[name for group in engine(x).param_groups for name in group["param_names"]] for x in (t, plain)]
    assert names[0] == names[1]  # so that either resumes from the other's checkpoint
    start = tiny_llama().parameters()
    for a, b, zero in zip(t.model.parameters(), plain.model.parameters(), start, strict=True):
        # traced with the same kernels; sampled bases follow rounding in degenerate tails
        assert (a - b).norm() <= 1e-2 * (b - zero).norm() + 1e-7


def test_quantised_weights_are_refused():
    codes = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="train it in float32, bfloat16 or float16, or freeze it"):
        LowRankOptimizer([{"params": [codes], "rank": 4}])


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(8, 4, sparse=True)
    opt = LowRankOptimizer(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse=False"):
        opt.step()
