"""The layerwise mode through Trainer, and what is refused before the first step."""

import pytest
import torch
from conftest import arguments, engine, options_for, tiny_data, tiny_llama, train
from streams import PLAIN
from transformers import Trainer

from hf_lowrank import METHODS


SOME = [
    *PLAIN,
    "ldadam",
    "online_subspace_adamw",
    "galore_i3s_adafactor",
]  # all of them in plain PyTorch: test_layerwise


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SOME else pytest.mark.full) for name in METHODS]
)
def test_it_equals_the_plain_run_under_a_schedule_and_resumes(name, tmp_path):
    options = options_for(name, stagger="true")
    common = {"max_grad_norm": 0.0, "optim_args": options, "lr_scheduler_type": "cosine"}
    plain = train(arguments(tmp_path / "plain", name, **common))
    saving = {"save_strategy": "steps", "save_steps": 3}
    layerwise = train(arguments(tmp_path / "layerwise", name + "_layerwise", **common, **saving))
    assert equal(plain, layerwise)  # the weights follow the schedule, not only the log
    path = str(tmp_path / "layerwise" / "checkpoint-3")
    resumed = train(arguments(tmp_path / "resumed", name + "_layerwise", **common), resume=path)
    assert equal(plain, resumed)


def test_max_grad_norm_is_taken_over_and_logged(tmp_path):
    free = train(arguments(tmp_path / "a", "galore_i3s_adamw_layerwise", max_grad_norm=0.0))
    args = arguments(tmp_path / "b", "galore_i3s_adamw_layerwise", max_grad_norm=0.1)
    clipped = train(args)
    assert engine(clipped).param_groups[0]["max_grad_norm"] == 0.1 and args.max_grad_norm == 0.1
    norms = [row["lowrank/projected_grad_norm"] for row in clipped.state.log_history if "loss" in row]
    assert len(norms) == 8 and all(norm > 0.1 for norm in norms)
    assert not equal(free, clipped)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("galore_i3s_adamw_layerwise", {"fp16": True}, "--fp16's scaler"),
        ("fira_adamw_layerwise", {"world_size": 2}, "DistributedDataParallel"),
        ("galore_i3s_adamw_layerwise", {"auto_find_batch_size": True}, "auto_find_batch_size begins again after"),
        ("fira_adamw_layerwise", {"auto_find_batch_size": True}, "auto_find_batch_size begins"),
    ],
)
def test_what_it_cannot_honour_is_refused_before_the_first_step(name, overrides, message, tmp_path, monkeypatch):
    late = {"fp16", "world_size"}  # TrainingArguments would want a GPU for the one, processes for the other
    args = arguments(tmp_path, name, **{key: value for key, value in overrides.items() if key not in late})
    for key in late & set(overrides):
        monkeypatch.setattr(type(args), key, overrides[key])
        vars(args).pop(key, None)
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())


def test_accumulation_through_trainer(tmp_path):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    t = train(arguments(tmp_path, "galore_i3s_adamw_layerwise", **split))
    assert t.state.global_step == 8
    assert all(int(s["step"]) == 8 for s in engine(t).state.values())


def test_a_run_that_was_interrupted_still_clips_when_it_goes_on(tmp_path):
    """Trainer's own clipping is held back within a step: Ctrl-C there must not leave it off."""

    class Interrupted(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2 and not self.args.seed:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    args = arguments(tmp_path, "galore_i3s_adamw_layerwise", seed=0)
    trainer = Interrupted(tiny_llama(), args, train_dataset=tiny_data())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    args.seed = 1
    trainer.train()
    assert args.max_grad_norm == engine(trainer).param_groups[0]["max_grad_norm"] == 1.0
