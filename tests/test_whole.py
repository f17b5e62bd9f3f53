"""Full-rank rows beside torch's own optimizers and transformers' Adafactor, and what their papers prove of them."""

from __future__ import annotations

import pytest
import torch
from distributed import models
from streams import SQUARE, TALL, WIDE, displacement, finish, gradients, optimizer, run, weight
from transformers.optimization import Adafactor

from hf_lowrank import LowRankOptimizer, param_groups


SHAPES = [WIDE, TALL, SQUARE, (64, 160), (160, 64)]
FULL = ["full_adamw", "full_sgd", "full_muon", "full_adam_mini"]


def beside(name, peer, shape, steps=30, **options):
    """Distance of a run from another optimizer's, in units of the displacement."""
    p, q, start = weight(shape), weight(shape), weight(shape)
    stream = gradients(shape, steps)
    ours = finish(optimizer(p, name, rank=1, lr=1e-2, **options), p, stream)
    return displacement(ours, finish(peer(q), q, stream), start)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_adamw_is_torchs(shape):

    def peer(p):
        return torch.optim.AdamW([p], lr=1e-2, weight_decay=0.1)

    assert beside("full_adamw", peer, shape, weight_decay=0.1) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["full_sgd", "full_sgd_layerwise"])
def test_full_sgd_is_torchs_bit_for_bit(name, shape):
    assert beside(name, lambda p: torch.optim.SGD([p], lr=1e-2), shape) == 0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum, options, theirs", [
    (0.95, {"adjust_lr": "original"}, {}),
    (0.9, {"nesterov": False, "ns_steps": 4}, {"nesterov": False, "ns_steps": 4, "adjust_lr_fn": "match_rms_adamw"}),
])  # fmt: skip
def test_full_muon_is_torchs(shape, momentum, options, theirs):

    def peer(p):
        return torch.optim.Muon([p], lr=1e-2, weight_decay=0.1, momentum=momentum, **theirs)

    # the iterations are in bf16 in both, product by product the same
    assert beside("full_muon", peer, shape, weight_decay=0.1, betas=(momentum, 0.999), **options) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_full_adalomo_is_adafactor_in_units_of_the_weight_without_momentum(shape):

    def peer(p):
        return Adafactor([p], lr=1e-2, relative_step=False, scale_parameter=True, warmup_init=False)

    assert beside("full_adalomo", peer, shape) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_sm3_covers_the_sum_of_the_squares_that_every_entry_has_had(shape):
    """Proposition 1 of its paper: both accumulators are at least that sum, at every step."""
    p = weight(shape)
    opt, total, stream = optimizer(p, "full_sm3", rank=1), torch.zeros(shape), gradients(shape, 20)
    for t in run(opt, p, stream):
        total += stream[t].square()
        s = opt.state[p]
        assert (s["row"] >= total.amax(0) * (1 - 1e-6)).all()  # the rows of the wide view are the weight's columns
        assert (s["col"] >= total.amax(1) * (1 - 1e-6)).all()  # sums of 20 numbers in fp32


def test_sm3_of_a_vector_is_adagrad():
    p, q, start = weight((9,)), weight((9,)), weight((9,))
    stream = [G[0] for G in gradients((5, 9), 20)]
    groups = [{"params": [p]}]
    ours = finish(LowRankOptimizer(groups, "full_sm3", lr=1e-2, betas=(0.0, 0.999)), p, stream)
    theirs = finish(torch.optim.Adagrad([q], lr=1e-2, eps=0.0), q, stream)
    assert displacement(ours, theirs, start) < 1e-6


@pytest.mark.parametrize("name", ["full_adamw", "full_msgd", "full_muon"])
def test_scale_multiplies_the_rate_and_not_the_decay(name):
    p, q, start = weight(TALL), weight(TALL), weight(TALL)
    stream = gradients(TALL, 8)
    a = finish(optimizer(p, name, lr=1e-2, scale=0.3, weight_decay=0.1), p, stream)
    b = finish(optimizer(q, name, lr=3e-3, weight_decay=0.1 / 0.3), q, stream)
    assert displacement(a, b, start) < 1e-5  # fp32, the products of rates in another order


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
@pytest.mark.parametrize("ending", ["", "_8bit"])
def test_moments_lie_in_memory_as_their_weight_does(shape, ending):
    """Else every step would read one of them across the grain."""
    p = weight(shape)
    opt = optimizer(p, "full_muon" + ending)
    finish(opt, p, gradients(shape, 2))
    moment = opt.state[p]["exp_avg"]
    assert moment.shape == shape[::-1] and moment.mT.is_contiguous()


@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
def test_four_bits_of_momentum_take_half_a_byte_and_turn_muons_step_by_little(shape):
    p, q, start = weight(shape), weight(shape), weight(shape)
    stream = gradients(shape, 20, decay=1.0)  # orthogonalising blows up what is small, rounding with it
    small = optimizer(p, "full_muon", orthogonalize="exact", state_format="4bit")
    whole = optimizer(q, "full_muon", orthogonalize="exact")
    distance = displacement(finish(small, p, stream), finish(whole, q, stream), start)
    kept = small.state[p]["exp_avg"].nbytes + small.state[p]["exp_avg.absmax"].nbytes
    rows, columns = shape  # a scale for 128 elements of a row
    assert kept == p.numel() / 2 + 4 * rows * -(-columns // 128)
    assert distance < 0.3  # 15 levels: seen 0.18


# ---- layerwise: every gradient is gone, and the run is the plain one -----------------------------------------------


@pytest.mark.parametrize("name", [*FULL, "fira_adamw"])
def test_every_gradient_is_freed_in_the_hook_that_of_embeddings_and_head_too(name):
    net = models.model(experts=2)
    opt = models.optimizer(net, name + "_layerwise")
    opt.train()
    before = [p.detach().clone() for p in net.parameters()]
    models.loss_of(net, 0).backward()
    assert all(p.grad is None for p in net.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    opt.step()


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 6)
        self.lm_head = torch.nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return torch.nn.functional.cross_entropy(self.lm_head(torch.tanh(self.mix(self.embed(ids)))), ids.flip(0))


@pytest.mark.parametrize("name", FULL)
def test_a_tied_embedding_is_stepped_once_with_both_of_its_gradients(name):
    ends = []
    for ending in ("", "_layerwise"):
        net = Tied()
        opt = LowRankOptimizer(param_groups(net, method=name + ending), name + ending, lr=1e-2)
        for step in range(4):
            opt.zero_grad()
            opt.train()
            net(torch.arange(11) * (step + 1) % 11).backward()
            opt.step()
        ends.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_second_gradient_of_an_embedding_is_refused_in_a_sentence():
    net = models.model()
    opt = models.optimizer(net, "full_sgd_layerwise")
    opt.train()
    models.loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match="second one came before step"):
        models.loss_of(net, 1).backward()
