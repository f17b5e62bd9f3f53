"""The layerwise mode through Trainer, and what is refused before the first step."""

import pytest
import torch
from conftest import arguments, engine, tiny_data, tiny_llama, train
from transformers import Trainer

from hf_lowrank import METHODS


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_it_equals_the_plain_run_under_a_schedule_and_resumes(name, tmp_path):
    options = "rank=4,update_proj_gap=3,stagger=true"
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
        ("fira_adamw_layerwise", {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}, "accumulation_steps 1"),
        ("fira_adamw_layerwise", {"max_grad_norm": 1.0}, "--max_grad_norm 0"),
        ("galore_i3s_adamw_layerwise", {"fp16": True}, "--fp16's scaler"),
        ("galore_i3s_adamw_layerwise", {"world_size": 2}, "DistributedDataParallel"),
    ],
)
def test_what_it_cannot_honour_is_refused_before_the_first_step(name, overrides, message, tmp_path):
    late = {key: overrides[key] for key in ("fp16",) if key in overrides}  # TrainingArguments wants a GPU for fp16
    args = arguments(tmp_path, name, **{k: v for k, v in overrides.items() if k not in ("fp16", "world_size")})
    for key, value in late.items():
        setattr(args, key, value)
    if "world_size" in overrides:
        args = type("TwoProcesses", (type(args),), {"world_size": 2, "__post_init__": lambda self: None})(
            **{k: v for k, v in args.__dict__.items() if k in type(args).__dataclass_fields__ and k != "optim"}
        )
        args.optim = name
    t = Trainer(tiny_llama(), arguments(tmp_path, "adamw_torch"), train_dataset=tiny_data())
    with pytest.raises(ValueError, match=message):
        t.get_optimizer_cls_and_kwargs(args, t.model)


def test_accumulation_through_trainer(tmp_path):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    t = train(arguments(tmp_path, "galore_i3s_adamw_layerwise", **split))
    assert t.state.global_step == 8
    assert all(int(s["step"]) == 8 for s in engine(t).state.values())
