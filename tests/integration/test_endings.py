"""However a training ends, the next one in this process finds nothing of it."""

import logging

import pytest
import torch
from conftest import arguments, engine, tiny_data, tiny_llama
from transformers import Trainer, TrainerCallback

import hf_lowrank
from hf_lowrank.hf.callback import LowRankCallback
from hf_lowrank.hf.trainer import LowRankTrainer


class Interrupts(TrainerCallback):
    """At the end of a step, or inside the backward pass of the next one."""

    def __init__(self, step, parameter=None):
        self.step, self.parameter = step, parameter

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        if self.parameter is None:
            raise KeyboardInterrupt
        self.handle = self.parameter.register_hook(self.fail)

    def fail(self, gradient):
        self.handle.remove()
        raise KeyboardInterrupt


def trained(model, folder, optim, kind=Trainer, callbacks=(), **more):
    t = kind(model, arguments(folder, optim, **more), train_dataset=tiny_data(), callbacks=[*callbacks])
    t.train()
    return t


@pytest.mark.parametrize("kind", [Trainer, LowRankTrainer])
@pytest.mark.parametrize("optim", ["galore_i3s_adamw_layerwise", "fira_adamw_layerwise"])
def test_an_interrupted_layerwise_run_leaves_the_next_optimizer_its_gradients(kind, optim, tmp_path):
    model, plain = tiny_llama(), tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        trained(model, tmp_path / "a", optim, kind, [Interrupts(2)], max_grad_norm=0.0)
    plain.load_state_dict(model.state_dict())
    for net, name in ((model, "b"), (plain, "c")):
        trained(net, tmp_path / name, "adamw_torch", optim_args=None)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("optim", ["galore_i3s_adamw_layerwise", "fira_adamw_layerwise"])
def test_what_a_broken_backward_pass_has_left_is_not_in_the_next_run(optim, tmp_path):
    """Of the same trainer, with its optimizer."""
    ends = []
    for broken in (True, False):
        model = tiny_llama()
        first = next(p for name, p in model.named_parameters() if "layers.0.self_attn.q_proj" in name)
        breaks = [Interrupts(2, first)] if broken else [Interrupts(2)]
        args = arguments(tmp_path / str(broken), optim, max_grad_norm=0.0)
        t = Trainer(model, args, train_dataset=tiny_data(), callbacks=breaks)
        with pytest.raises(KeyboardInterrupt):
            t.train()
        t.remove_callback(breaks[0])
        if "fira" not in optim:  # whose hooks have stepped what the backward pass has reached
            t.train()
            ends.append([p.detach().clone() for p in model.parameters()])
        else:
            t.train()
    assert not ends or all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_layer_sampling_ends_with_the_arguments_that_asked_for_it(tmp_path):
    t = trained(tiny_llama(), tmp_path, "adamw_torch", optim_args="layer_sampling=lisa,sampled_layers=1")
    t.args.optim_args = None
    seen = []

    class Looks(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            seen.append(all(p.requires_grad for p in model.parameters()))

    t.add_callback(Looks())
    t.train()
    assert seen and all(seen)
    t.args.optim_args = "layer_sampling=lisa,sampled_layers=2"  # other options than before are not "given twice"
    t.train()


def test_clipping_is_given_back_where_an_epoch_ends_inside_an_accumulation(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(tiny_data()[:12])

    args = arguments(tmp_path, "galore_i3s_adamw_layerwise", max_steps=5, gradient_accumulation_steps=2)
    assert args.max_grad_norm == 1.0
    Trainer(tiny_llama(), args, train_dataset=Stream()).train()
    assert args.max_grad_norm == 1.0


def test_a_run_inside_another_leaves_it_the_folder(tmp_path):
    class Inside(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                for optim in ("adamw_torch", "galore_i3s_adamw"):
                    more = {} if "galore" in optim else {"optim_args": None}
                    trained(tiny_llama(), tmp_path, optim, max_steps=1, **more)
                    there.append((tmp_path / "_hf_lowrank.lock").exists())

    there = []
    trained(tiny_llama(), tmp_path, "galore_i3s_adamw", callbacks=[Inside()], max_steps=2)
    assert there == [True, True] and not (tmp_path / "_hf_lowrank.lock").exists()


def test_a_run_goes_on_from_weights_alone(tmp_path, caplog):
    """As plain Trainer does with save_only_model; it is said that moments start anew."""
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trained(tiny_llama(), tmp_path, "galore_i3s_adamw", max_steps=2, **saving)
    caplog.set_level("WARNING", logger="hf_lowrank")
    logging.getLogger("hf_lowrank").propagate = True
    args = arguments(tmp_path, "galore_i3s_adamw", max_steps=4, **saving)
    t = Trainer(tiny_llama(), args, train_dataset=tiny_data())
    t.train(resume_from_checkpoint=True)
    assert t.state.global_step == 4
    assert {int(s["step"]) for s in engine(t).state.values()} == {2}
    assert "holds weights alone" in caplog.text


def test_a_seed_of_the_optimizer_alone_is_refused(tmp_path):
    args = arguments(tmp_path, "galore_i3s_adamw", optim_args="rank=4,seed=7")
    with pytest.raises(ValueError, match="seed is set by the training argument seed"):
        Trainer(tiny_llama(), args, train_dataset=tiny_data()).create_optimizer()


@pytest.mark.parametrize("option", ["adam_beta1=0.5", "warmup_steps=3", "bf16=true", "optim_target_modules=fc"])
def test_an_argument_of_trainers_among_the_options_is_named(option, tmp_path):
    args = arguments(tmp_path, "galore_i3s_adamw", optim_args=f"rank=4,{option}")
    name = option.partition("=")[0]
    with pytest.raises(ValueError, match=f"{name} is set by the training argument {name}, not here"):
        Trainer(tiny_llama(), args, train_dataset=tiny_data()).create_optimizer()


def test_the_trainer_of_ours_reports_with_a_callback_of_ones_own_and_builds_by_name(tmp_path):
    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.update(logs or {})

    seen = {}
    args = arguments(tmp_path, "galore_i3s_adamw", max_steps=2)
    callbacks = [Reporter(), LowRankCallback(update_rank="off")]
    t = LowRankTrainer(tiny_llama(), args, train_dataset=tiny_data(), callbacks=callbacks)
    cls, _ = t.get_optimizer_cls_and_kwargs(args, t.model)
    t.train()
    assert cls is hf_lowrank.LowRankOptimizer
    assert any(key.startswith("lowrank/") for key in seen)


def test_a_level_that_the_user_has_set_stays(tmp_path):
    log = logging.getLogger("hf_lowrank")
    before = log.level
    try:
        log.setLevel(logging.ERROR)
        hf_lowrank.register()
        LowRankTrainer(tiny_llama(), arguments(tmp_path, "galore_i3s_adamw"), train_dataset=tiny_data())
        assert log.level == logging.ERROR
    finally:
        log.setLevel(before)
