"""Delta-LoRA (arXiv 2309.02411) is LoRA with another scale: why it is no baseline of its own."""

import pytest
import torch


OUT, IN, RANK, START, STEPS, S, LAMBDA = 8, 12, 2, 5, 40, 0.5, 2.0
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=2e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-12),
}


def problem():
    gen = torch.Generator().manual_seed(0)
    shapes = [(OUT, IN), (OUT, IN), (RANK, IN), (OUT, RANK), (30, IN)]
    return [torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes]


def train(optimizer, *, forward, after=lambda step, A, B, old: None, share=lambda step: 1.0):
    """Train the factors; `share` multiplies their gradients, `after` is called with B A before and after a step."""
    _, target, A, B, x = problem()
    A, B = torch.nn.Parameter(A), torch.nn.Parameter(0 * B)
    optimizer, path = OPTIMIZERS[optimizer]([A, B]), []
    for step in range(STEPS):
        optimizer.zero_grad()
        W = forward(step, A, B)
        path.append(W.detach().clone())
        (x @ (W - target).T).square().mean().backward()
        for p in (A, B):
            p.grad *= share(step)
        old = (B @ A).detach()
        optimizer.step()
        after(step, A, B, old)
    return torch.stack(path)


def literal(optimizer):
    """As the paper has it: from step K on W moves along with the factors, W <- W + lambda s (B'A' - B A)."""
    W = problem()[0]

    def after(step, A, B, old):
        if step >= START:
            W.add_(LAMBDA * S * ((B @ A).detach() - old))

    return train(optimizer, forward=lambda step, A, B: W + S * B @ A, after=after)


def scaled(optimizer, *, divided=True):
    """LoRA: at step K the base loses lambda s B A, and the scale becomes (1 + lambda) s."""
    W, scale = problem()[0], [S]

    def forward(step, A, B):
        if step == START:
            W.sub_(LAMBDA * S * (B @ A).detach())
            scale[0] = (1 + LAMBDA) * S
        return W + scale[0] * B @ A

    return train(optimizer, forward=forward, share=lambda s: 1 / (1 + LAMBDA) if divided and s >= START else 1.0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_is_lora_with_another_scale(optimizer):
    path = literal(optimizer)
    torch.testing.assert_close(scaled(optimizer), path, atol=1e-10, rtol=0)  # float64, forty steps
    assert torch.linalg.matrix_rank(path[-1] - path[0], rtol=1e-9) <= 2 * RANK  # and not of a high rank


def test_for_adam_only_the_scale_matters_soon_after():
    """Adam divides by the size of the gradient: that of the factors is multiplied by 1 + lambda and divided again."""
    found, path = scaled("adam", divided=False), literal("adam")
    torch.testing.assert_close(found[: START + 1], path[: START + 1], atol=1e-12, rtol=0)
    # the moments before K remember gradients of another size; they fade
    assert (found - path).norm() < 0.2 * (path[-1] - path[0]).norm() * STEPS**0.5
