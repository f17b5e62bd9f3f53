"""MeZO, LOZO and SubZero: what is measured is the slope, what is stepped is what was measured, nothing is lost."""

import shutil
from pathlib import Path

import pytest
import torch
import zeroth_order_worker
from processes import on_processes
from tiny_llama import options_of, tiny, trained
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from recipes.shared.baselines import trainer_of
from recipes.shared.zeroth_order import ZerothOrderSGD, ZerothOrderTrainer, full, lozo, subzero


DRAWS = {"mezo": full, "lozo": lozo(rank=2, every=2), "subzero": subzero(rank=3, every=2)}
NAMES = list(DRAWS)
SHAPES = [torch.Size((12, 8)), torch.Size((8, 16)), torch.Size((5,))]


class Bowl(nn.Module):
    """The mean over rows of 1/2 |W x + b - y|^2: a quadratic function of W and b."""

    def __init__(self):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.W = nn.Parameter(torch.randn(6, 4, generator=gen))
        self.b = nn.Parameter(torch.randn(6, generator=gen))

    def forward(self, x, labels):
        return {"loss": 0.5 * (x @ self.W.T + self.b - labels).square().sum(-1).mean()}


class Pairs(torch.utils.data.Dataset):
    def __init__(self):
        gen = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(16, 4, generator=gen), torch.randn(16, 6, generator=gen)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


class Measured(TrainerCallback):
    """What had been measured when the first step was made."""

    found = None

    def on_pre_optimizer_step(self, *args, optimizer, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.found = self.found or list(optimizer.measured)


def bowl(folder, draw=full, *, rate=0.0, eps=1e-2, in_place=False, **options):
    values = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": rate, "max_grad_norm": 0.0, **options}
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **values
    )
    seen = Measured()
    trainer = ZerothOrderTrainer(
        Bowl(), args, draw=draw, eps=eps, in_place=in_place, train_dataset=Pairs(), callbacks=[seen]
    )
    trainer.train()
    return trainer, seen.found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_place", [False, True])
def test_on_a_quadratic_the_slope_is_the_gradient_along_the_direction(tmp_path, name, in_place):
    """c = <grad, Z> exactly, whatever eps is; and the step is W - lr c Z."""
    trainer, [(key, slope)] = bowl(tmp_path, DRAWS[name], rate=1e-2, in_place=in_place)
    before, batch = Bowl(), next(iter(trainer.get_train_dataloader()))
    loss = before(**batch)["loss"]
    loss.backward()
    Z = [DRAWS[name](key, number, p.shape, p.device) for number, p in enumerate(before.parameters())]
    expected = sum((p.grad * z).sum() for p, z in zip(before.parameters(), Z, strict=True)).item()
    # fp32 losses of about 10 are exact to 1e-6, and their difference is divided by 2 eps = 0.02
    assert slope == pytest.approx(expected, abs=1e-3)
    for p, q, z in zip(trainer.model.parameters(), before.parameters(), Z, strict=True):
        torch.testing.assert_close(p, q - 1e-2 * slope * z, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_the_estimates_is_the_gradient(name):
    """The slope of E[c Z] on G is 1, within four standard errors, for matrices and vectors together."""
    draw = {"mezo": full, "lozo": lozo(rank=2, every=1), "subzero": subzero(rank=3, every=1)}[name]
    gen = torch.Generator().manual_seed(0)
    G = [torch.randn(shape, generator=gen) for shape in SHAPES]
    square = sum(g.square().sum() for g in G)
    found = []
    for step in range(3000):
        along = sum((g * draw((7, step, 0), i, g.shape, g.device)).sum() for i, g in enumerate(G))
        found.append(along**2 / square)  # <c Z, G> / <G, G>
    found = torch.stack(found)
    assert abs(found.mean() - 1) < 4 * found.std() / len(found) ** 0.5


@pytest.mark.parametrize(("name", "rank"), [("lozo", 2), ("subzero", 3)])
def test_directions_have_the_rank_and_their_subspace_stays(name, rank):
    Z = [DRAWS[name]((7, step, 0), 0, SHAPES[0], torch.device("cpu")) for step in range(4)]
    assert all(torch.linalg.matrix_rank(z, rtol=1e-4) == rank for z in Z)
    kept, new = torch.cat([Z[0], Z[1]]), torch.cat([Z[1], Z[2]])  # two steps share the row space
    assert torch.linalg.matrix_rank(kept, rtol=1e-4) == rank and torch.linalg.matrix_rank(new, rtol=1e-4) == 2 * rank


@pytest.mark.parametrize("name", NAMES)
def test_the_step_is_along_what_was_measured_also_where_the_subspace_is_new(name):
    for step in range(5):  # new at 0, 2 and 4
        moved, stepped = ([nn.Parameter(torch.zeros(shape)) for shape in SHAPES] for _ in range(2))
        key = (3, step, 0)
        ZerothOrderSGD(moved, 1.0, draw=DRAWS[name]).move_(key, 1.0)
        optimizer = ZerothOrderSGD(stepped, 1.0, draw=DRAWS[name])
        optimizer.measured.append((key, -1.0))
        optimizer.step()
        assert all(p.any() and torch.equal(p, q) for p, q in zip(moved, stepped, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_restored_bit_for_bit(tmp_path, dtype):
    model = tiny().to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    options = {"max_steps": 3, "learning_rate": 0.0, "max_grad_norm": 0.0, "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, **options)
    ZerothOrderTrainer(
        model, args, draw=full, eps=0.1, in_place=False, train_dataset=zeroth_order_worker.Rows()
    ).train()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def test_two_micro_batches_are_the_mean_of_two_estimates(tmp_path):
    _, [(key, alone)] = bowl(tmp_path)
    _, both = bowl(tmp_path, gradient_accumulation_steps=2)
    assert [key for key, _ in both] == [key, (*key[:2], 1)]
    assert both[0][1] == pytest.approx(alone / 2, abs=1e-3)  # the same rows and direction


@pytest.mark.parametrize("name", NAMES)
def test_resumed_equals_uninterrupted(tmp_path, name):
    options = {
        "max_grad_norm": 0.0,
        "zo_rank": 2,
        "zo_every": 2,
        "gradient_accumulation_steps": 2,
        "weight_decay": 0.1,
    }
    whole = trained(tmp_path, name, **options)
    assert not whole.optimizer.state_dict()["state"]
    expected = [p.detach().clone() for p in whole.model.parameters()]
    assert not any(torch.equal(p, q) for p, q in zip(expected, tiny().parameters(), strict=True))
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = trained(tmp_path, name, resume=str(tmp_path / "checkpoint-3"), **options)
    assert all(torch.equal(p, q) for p, q in zip(expected, resumed.model.parameters(), strict=True))


@pytest.mark.processes
def test_two_numbers_travel_in_a_step_and_the_weights_stay_equal(tmp_path):
    done = on_processes(2, Path(zeroth_order_worker.__file__), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (first, sent), (second, _) = (torch.load(tmp_path / f"2-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sent == 3 * [[("c10d::allreduce_", 2)]]
    zeroth_order_worker.main(tmp_path)
    alone, nothing = torch.load(tmp_path / "1-0.pt")
    assert nothing[-3:] == [[], [], []]
    for name in first:  # the same rows a step: slopes of the same losses, to fp32 over 2 eps, times lr
        torch.testing.assert_close(first[name], alone[name], atol=1e-5, rtol=0)


def test_without_a_zeroth_order_baseline_it_is_trainer():
    assert trainer_of(options_of(None)) is Trainer and trainer_of(options_of("lora")) is Trainer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_grad_norm": 1.0}, "--max_grad_norm 1 would clip nothing"),
        ({"eps": 0.0}, "--zo_eps must be above 0"),
        ({"in_place": True, "gradient_accumulation_steps": 2}, "set --gradient_accumulation_steps 1 or leave it out"),
    ],
)
def test_errors_say_what_to_do(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        bowl(tmp_path, **options)


def test_more_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="--zo_rank must be at least 1, not 0"):
        trainer_of(options_of("lozo", zo_rank=0))
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_grad_norm=0.0)
    with pytest.raises(ValueError, match="in_place wants weights in float32"):
        ZerothOrderTrainer(tiny().bfloat16(), args, draw=full, eps=1e-3, in_place=True)
