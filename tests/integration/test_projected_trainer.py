"""Trainer where gradients are not whole when it looks: averaged as they are projected, or waiting in host memory."""

from pathlib import Path

import pytest
import torch
from conftest import arguments, engine, options_for, tiny_llama, train
from processes import on_processes
from transformers import Trainer


WORKER = Path(__file__).parent / "projected_worker.py"
OPTIONS = "rank=4,update_proj_gap=2,stagger=false"
SETTING = {"max_steps": 6, "max_grad_norm": 0.1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


def apart(a, b):
    """||a - b|| / ||b - start||."""
    start = [p.detach() for p in tiny_llama().parameters()]
    flat = [torch.cat([p.detach().flatten() for p in some]).double() for some in (a, b, start)]
    return ((flat[0] - flat[1]).norm() / (flat[1] - flat[2]).norm()).item()


def launched(kind, folder):
    result = on_processes(2, WORKER, kind, folder)
    assert (folder / "found.pt").exists(), result.stderr[-4000:]
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.processes
def test_replicas_average_and_clip_what_is_projected(tmp_path):
    """One process clips by the norm of projected gradients too where it is layerwise (there its first basis would
    know the first micro-batch alone, so it has one batch)."""
    found = launched("ddp", tmp_path)
    for name, figures in found.items():
        assert figures["left to us"], name
        norms = [row["lowrank/projected_grad_norm"] for row in figures["logged"]]
        assert len(norms) == 6 and min(norms) > 0.1, name
        assert apart(figures["weights"], found["reduced"]["weights"]) < 1e-6, name  # the same sums
    whole = {**SETTING, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    alone = train(arguments(tmp_path / "alone", "galore_dominant_adamw_layerwise", optim_args=OPTIONS, **whole))
    # sums of gradients in another order, amplified by Adam
    assert apart(found["reduced"]["weights"], alone.model.parameters()) < 1e-3


@pytest.mark.processes
def test_offloaded_shards_accumulate_and_clip_as_the_plain_run(tmp_path):
    figures = launched("SHARDED_STATE_DICT", tmp_path)["offload"]
    assert figures["layerwise"] == "offload"
    assert all(row["lowrank/grad_norm"] > 0.1 for row in figures["logged"])
    alone = train(arguments(tmp_path / "alone", "fira_adamw", optim_args=OPTIONS, **SETTING))
    # sums of gradients in another order, amplified by Adam
    assert apart(figures["weights"], alone.model.parameters()) < 1e-3


@pytest.mark.parametrize("name", ["fira_adamw", "ldadam", "full_adamw"])
def test_offloading_accumulates_and_clips_as_the_plain_run(name, tmp_path):
    options = options_for(name) if name == "full_adamw" else options_for(name, stagger="false")
    plain = train(arguments(tmp_path / "plain", name, optim_args=options, **SETTING))
    offloaded = train(arguments(tmp_path / "offloaded", name + "_layerwise", optim_args=options, **SETTING))
    assert engine(offloaded).param_groups[0]["layerwise"] == "offload"
    # the norms of tensors are summed in another order than Trainer sums them, a rounding of 1e-7 in one factor
    assert apart(offloaded.model.parameters(), plain.model.parameters()) < 1e-4
    norms = [[row[key] for row in t.state.log_history if "loss" in row] for t, key in
             ((plain, "grad_norm"), (offloaded, "lowrank/grad_norm"))]  # fmt: skip
    assert norms[1] == pytest.approx(norms[0], rel=1e-5) and min(norms[0]) > 0.1


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("galore_i3s_adamw", {"world_size": 2, "fp16": True}, "--fp16's scaler"),
        ("fira_adamw", {"world_size": 2}, "needs the gradient itself"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_the_first_step(name, overrides, message, tmp_path, monkeypatch):
    args = arguments(tmp_path, name, optim_args="reduce_projected=true")
    for key, value in overrides.items():  # TrainingArguments would want a GPU for the one, processes for the other
        monkeypatch.setattr(type(args), key, value)
        vars(args).pop(key, None)
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())


def test_one_process_has_nothing_to_average(tmp_path):
    plain = train(arguments(tmp_path / "plain", "galore_i3s_adamw", optim_args=OPTIONS))
    asked = train(arguments(tmp_path / "asked", "galore_i3s_adamw", optim_args=OPTIONS + ",reduce_projected=true"))
    assert all(torch.equal(p, q) for p, q in zip(plain.model.parameters(), asked.model.parameters(), strict=True))
