"""VeLoRA as peft has it, against the formula: the input of A is what its groups are along one direction."""

import torch
from tiny_llama import options_of, tiny
from torch import nn
from transformers import TrainingArguments

from recipes.shared.baselines import prepare_


GROUPS = 4


def gradient(x):
    """Return dL/dA of one layer, what A saw (tokens, in), and the gradient of its output (tokens, r)."""
    model = tiny()
    options = options_of("lora", adapter_kind="velora", velora_groups=GROUPS, adapter_dropout=0.0)
    prepare_(model, options, TrainingArguments("unused", use_cpu=True))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    nn.init.normal_(layer.lora_B["default"].weight)
    dy = torch.randn(len(x), 16, generator=torch.Generator().manual_seed(1))
    layer(x).backward(dy)
    s = 32.0 / 2  # alpha over rank
    return layer.lora_A["default"].weight.grad, s * dy @ layer.lora_B["default"].weight.detach()


def test_the_gradient_sees_the_projection_on_the_mean_direction_of_the_groups():
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    pieces = x.reshape(-1, 16 // GROUPS)
    v = pieces.mean(0) / pieces.mean(0).norm()
    seen = (pieces @ v[:, None] * v).reshape(x.shape)
    found, dz = gradient(x)
    # fp32, sums of 10 products
    torch.testing.assert_close(found, dz.T @ seen, atol=1e-4, rtol=0)
    assert (found - dz.T @ x).norm() > 0.5 * (dz.T @ x).norm()  # on noise next to nothing is left


def test_inputs_along_one_direction_lose_nothing():
    v = torch.randn(16 // GROUPS, generator=torch.Generator().manual_seed(2))
    x = (torch.rand(10, GROUPS, 1, generator=torch.Generator().manual_seed(3)) * v).reshape(10, 16)
    found, dz = gradient(x)
    torch.testing.assert_close(found, dz.T @ x, atol=1e-4, rtol=0)
