"""Whichever way an optimizer comes to Trainer, the same arguments train the same model, and the same is refused."""

import dataclasses
import logging

import pytest
import torch
from conftest import arguments, engine, tiny_data, tiny_llama, train
from transformers import Trainer, TrainingArguments

import hf_lowrank
from hf_lowrank import LowRankCallback, LowRankOptimizer, LowRankTrainer


NAME = "galore_i3s_adamw"
OPTIONS = {"rank": 4, "update_proj_gap": 3}
LAYERWISE = f"{NAME}_layerwise"
HYPERPARAMETERS = {"lr": 1e-2, "weight_decay": 0.1}
LOW = 1e-2
"""A norm that every gradient is above, and that moves dense parameters and matrices by other steps than 1 does."""


def by_flag(folder, name, **overrides):
    return train(arguments(folder, name, **overrides))


def by_pair(folder, name, **overrides):
    args, model = arguments(folder, "adamw_torch", **overrides), tiny_llama()
    pair = hf_lowrank.optimizer_cls_and_kwargs(model, name, args=args, **OPTIONS)
    return train(args, model, optimizer_cls_and_kwargs=pair, callbacks=[LowRankCallback()])


def by_hand(folder, name, **overrides):
    args, model = arguments(folder, "adamw_torch", **overrides), tiny_llama()
    groups = hf_lowrank.param_groups(model, method=name, weight_decay=0.1, **OPTIONS)
    optimizer = LowRankOptimizer(groups, name, lr=1e-2, seed=args.seed)
    return train(args, model, optimizers=(optimizer, None), callbacks=[LowRankCallback()])


ROUTES = {"flag": by_flag, "pair": by_pair, "optimizers=": by_hand}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def same(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("route", ["pair", "optimizers="])
@pytest.mark.parametrize("norm", [LOW, 0.0])
def test_the_layerwise_mode_clips_by_trainers_argument_on_every_route(route, norm, tmp_path):
    """A group that Trainer did not make knew nothing of the argument: nothing was clipped but what is dense."""
    flag = by_flag(tmp_path / "flag", LAYERWISE, max_grad_norm=norm)
    other = ROUTES[route](tmp_path / "other", LAYERWISE, max_grad_norm=norm)
    assert {group["max_grad_norm"] for group in engine(other).param_groups} == {norm}
    assert same(flag, other)
    if norm:
        assert not same(flag, by_flag(tmp_path / "free", LAYERWISE, max_grad_norm=0.0))


def test_a_pair_of_a_method_that_steps_in_the_hook_keeps_gradients_to_clip_them(tmp_path):
    flag = by_flag(tmp_path / "flag", "fira_adamw_layerwise", max_grad_norm=LOW)
    pair = by_pair(tmp_path / "pair", "fira_adamw_layerwise", max_grad_norm=LOW)
    assert {group["layerwise"] for group in engine(pair).param_groups} == {"offload"}
    assert same(flag, pair)


def test_what_steps_in_the_hook_says_that_it_does_not_clip(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hf_lowrank"):
        by_hand(tmp_path, "fira_adamw_layerwise", max_grad_norm=1.0)
    assert "max_grad_norm=1 has no effect: fira_adamw steps along the gradient itself" in caplog.text


def own_norm(folder, name, **overrides):
    args, model = arguments(folder, "adamw_torch", **overrides), tiny_llama()
    groups = hf_lowrank.param_groups(model, method=name, max_grad_norm=LOW, **OPTIONS)
    return train(
        args, model, optimizers=(LowRankOptimizer(groups, name, lr=1e-2), None), callbacks=[LowRankCallback()]
    )


def own_norm_of_a_pair(folder, name, **overrides):
    args, model = arguments(folder, "adamw_torch", **overrides), tiny_llama()
    pair = hf_lowrank.optimizer_cls_and_kwargs(model, name, args=args, max_grad_norm=LOW, **OPTIONS)
    return train(args, model, optimizer_cls_and_kwargs=pair, callbacks=[LowRankCallback()])


def own_norm_beside_a_name(folder, name, **overrides):
    class Creating(Trainer):
        def create_optimizer(self, model=None):
            groups = hf_lowrank.param_groups(self.model, method=name, max_grad_norm=LOW, **OPTIONS)
            self.optimizer = LowRankOptimizer(groups, name, lr=1e-2)
            return self.optimizer

    return train(arguments(folder, name, **overrides), trainer_class=Creating)


@pytest.mark.parametrize("route", [own_norm, own_norm_of_a_pair, own_norm_beside_a_name])
def test_a_norm_of_ones_own_is_kept(route, tmp_path):
    trainer = route(tmp_path, LAYERWISE, max_grad_norm=1.0)
    assert {group["max_grad_norm"] for group in engine(trainer).param_groups} == {LOW}


@pytest.mark.parametrize("route", ROUTES)
def test_another_norm_for_a_second_training_is_taken(route, tmp_path):
    trainer = ROUTES[route](tmp_path, LAYERWISE, max_grad_norm=1.0)
    for norm in (LOW, 0.0, 0.5):
        trainer.args.max_grad_norm = norm
        trainer.train()
        assert {group["max_grad_norm"] for group in engine(trainer).param_groups} == {norm}
        assert trainer.args.max_grad_norm == norm


def test_groups_that_cannot_all_be_clipped_train_and_say_so(tmp_path, caplog):
    args, model = arguments(tmp_path, "adamw_torch", max_grad_norm=1.0), tiny_llama()
    matrices = list(hf_lowrank.target_parameters(model, rank=4))
    layerwise = {"params": [model.get_parameter(name) for name in matrices[2:]], "layerwise": True}
    plain = {"params": [model.get_parameter(name) for name in matrices[:2]], "method": "fira_adamw"}
    rest = {"params": [p for name, p in model.named_parameters() if name not in matrices]}
    optimizer = LowRankOptimizer([{**layerwise, **OPTIONS}, {**plain, **OPTIONS}, rest], NAME, lr=1e-2)
    with caplog.at_level(logging.WARNING, "hf_lowrank"):
        train(args, model, optimizers=(optimizer, None), callbacks=[LowRankCallback()])
    assert "max_grad_norm=1 has no effect: fira_adamw steps along the gradient itself" in caplog.text


def test_an_interrupted_run_gives_the_arguments_back(tmp_path):
    class Interrupted(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    args = arguments(tmp_path, LAYERWISE, max_grad_norm=LOW)
    with pytest.raises(KeyboardInterrupt):
        Interrupted(tiny_llama(), args, train_dataset=tiny_data()).train()
    assert args.max_grad_norm == LOW
    assert dataclasses.replace(args).max_grad_norm == LOW


@pytest.mark.skipif(
    "enable_jit_checkpoint" not in {field.name for field in dataclasses.fields(TrainingArguments)},
    reason="this transformers saves no checkpoint before a step",
)
def test_nothing_is_stepped_before_a_checkpoint_that_comes_before_the_step(tmp_path):
    args = arguments(tmp_path, "fira_adamw_layerwise", max_grad_norm=0.0, enable_jit_checkpoint=True)
    _, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())
    assert {group["layerwise"] for group in kwargs["params"]} == {"offload"}


def test_a_pair_is_refused_the_second_time(tmp_path):
    """Trainer takes the groups out of it: all moments would be full."""
    args, model = arguments(tmp_path, "adamw_torch", max_steps=1), tiny_llama()
    pair = hf_lowrank.optimizer_cls_and_kwargs(model, NAME, args=args, **OPTIONS)
    train(args, model, optimizer_cls_and_kwargs=pair)
    with pytest.raises(ValueError, match="the pair of optimizer_cls_and_kwargs has been used.*Ask for a new one"):
        train(args, model, optimizer_cls_and_kwargs=pair)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("damage, words", [
    ("optimizer.pt", "optimizer.pt is missing"), ("scheduler.pt", "scheduler.pt is missing"), ("bit", "is damaged"),
])  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_refused_on_every_route(route, damage, words, tmp_path, monkeypatch):
    saving = {"save_strategy": "steps", "save_steps": 4}
    ROUTES[route](tmp_path, NAME, **saving)
    checkpoint = tmp_path / "checkpoint-4"
    if damage == "bit":
        data = bytearray((checkpoint / "optimizer.pt").read_bytes())
        data[len(data) // 2] ^= 1
        (checkpoint / "optimizer.pt").write_bytes(data)
    else:
        (checkpoint / damage).unlink()
    resumed = lambda self, *args, **kwargs: original(self, str(checkpoint))  # noqa: E731
    original = Trainer.train
    monkeypatch.setattr(Trainer, "train", resumed)
    with pytest.raises(ValueError, match=rf"cannot resume from .*checkpoint-4: .*{words}"):
        ROUTES[route](tmp_path, NAME, **saving)


def test_a_trainer_of_ours_passes_over_an_incomplete_checkpoint_by_itself(tmp_path):
    args = arguments(tmp_path, NAME, save_strategy="steps", save_steps=2)
    whole = train(args, trainer_class=LowRankTrainer)
    (tmp_path / "checkpoint-8" / "trainer_state.json").unlink()
    hf_lowrank.unregister()
    assert same(whole, train(args, trainer_class=LowRankTrainer, resume=True))
    for state in tmp_path.glob("checkpoint-*/trainer_state.json"):
        state.unlink()
    with pytest.raises(ValueError, match="there is no whole checkpoint in"):
        train(args, trainer_class=LowRankTrainer, resume=True)


def test_a_best_checkpoint_holds_what_a_resumed_log_needs(tmp_path):
    """It is saved after an evaluation, which the end of the step does not announce."""
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    args = arguments(tmp_path, NAME, logging_steps=4, **best)
    trainer = Trainer(tiny_llama(), args, train_dataset=tiny_data(), eval_dataset=tiny_data())
    trainer.train()
    kept = [path for path in tmp_path.glob("checkpoint-*") if int(path.name.rpartition("-")[2]) % 4]
    assert kept  # saved between two logs
    at = int(kept[0].name.rpartition("-")[2])
    again = Trainer(tiny_llama(), args, train_dataset=tiny_data(), eval_dataset=tiny_data())
    again.train(resume_from_checkpoint=str(kept[0]))

    def logs(one):
        rows = [row for row in one.state.log_history if "loss" in row and row["step"] > at]
        timed = ("refresh_ms", "update_rank")  # the second is measured when the best is known, after the state is kept
        return [{k: v for k, v in row.items() if "lowrank" in k and not k.endswith(timed)} for row in rows]

    assert logs(again) == logs(trainer) != []
