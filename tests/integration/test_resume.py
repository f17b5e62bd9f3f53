"""A resumed run is the uninterrupted run, bit for bit; what cannot be resumed is refused and nothing is lost."""

import json
import pathlib
import shutil
import warnings

import pytest
import torch
from conftest import arguments, engine, tiny_data, tiny_llama, train
from streams import COVERING, PLAIN

from hf_lowrank import METHODS


TIMING = ("runtime", "per_second", "refresh_ms", "train_loss", "total_flos")
"""Log keys that measure time, and the final averages, which Trainer itself restarts on resume."""


def history(trainer):
    rows = [{k: v for k, v in row.items() if not any(t in k for t in TIMING)} for row in trainer.state.log_history]
    return [row for row in rows if "loss" in row]


def same_state(a, b):
    for group_a, group_b in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(group_a["params"], group_b["params"], strict=True):
            assert a.state[p].keys() == b.state[q].keys()
            assert all(torch.equal(a.state[p][key], b.state[q][key]) for key in a.state[p])
            assert all(a.state[p][key].dtype == b.state[q][key].dtype for key in a.state[p])


EVERY = [(name, dtype) for name in METHODS for dtype in ("float32", "bfloat16")]
SHORT = [(name, dtype) for name, dtype in EVERY if name in PLAIN or (name in COVERING and dtype == "bfloat16")]


@pytest.mark.parametrize(
    "name, dtype",  # both types for a few, the rest where the low precision is; everything in the long tier
    [pytest.param(*case, marks=() if case in SHORT else pytest.mark.full) for case in EVERY],
)
def test_resumed_at_every_step_of_an_interval_it_equals_the_uninterrupted_run(name, dtype, tmp_path):
    dtype = getattr(torch, dtype)
    # refreshes before steps 1, 4 and 7: checkpoints 2, 3 and 4 lie before, at and after one
    whole = train(arguments(tmp_path / "whole", name, save_strategy="steps", save_steps=1), tiny_llama(dtype))
    for step in (2, 3, 4) if name in PLAIN else (3,):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", folder)  # also the files that the run will write on
        resumed = train(arguments(folder, name), tiny_llama(dtype), resume=str(folder / f"checkpoint-{step}"))
        assert history(resumed) == history(whole)
        weights = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in weights)
        same_state(engine(whole), engine(resumed))
        files = [path / "hf_lowrank_refreshes.jsonl" for path in (tmp_path / "whole", folder)]
        assert all(file.exists() != engine(whole).configs[0].parts.direct for file in files)  # which refreshes nothing
        lines = [file.read_text() if file.exists() else "" for file in files]
        assert lines[0] == lines[1]  # no gap, no doubled line


@pytest.mark.parametrize("name", ["galore_i3s_adamw", "galore_i3s_adamw_layerwise", "fira_adamw"])
def test_resumed_at_an_accumulation_boundary(name, tmp_path):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = train(arguments(tmp_path / "whole", name, **split, **saving))
    for step in (3, 4):
        path = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = train(arguments(tmp_path / f"from-{step}", name, **split), resume=path)
        assert history(resumed) == history(whole)
        same_state(engine(whole), engine(resumed))


def test_state_of_another_shape_is_a_readable_error(tmp_path):
    saved = engine(train(arguments(tmp_path / "a", "galore_i3s_adamw", max_steps=1))).state_dict()
    wider = engine(train(arguments(tmp_path / "b", "galore_i3s_adamw", max_steps=1), tiny_llama(intermediate_size=40)))
    with pytest.raises(
        ValueError, match=r"gate_proj.weight does not fit: exp_avg is torch.float32 \(4, 24\), expected"
    ):
        wider.load_state_dict(saved)


def test_the_checkpoint_loads_with_weights_only(tmp_path):
    train(arguments(tmp_path, "fira_i3s_adamw", save_strategy="steps", save_steps=4, max_steps=4))
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for s in saved["state"].values() for v in s.values())
    plain = (str, int, float, bool, type(None))
    for group in saved["param_groups"]:
        assert group["format"] == 3
        assert all(isinstance(v, (*plain, list, tuple)) for v in group.values())


def checkpoint(tmp_path, optim="galore_i3s_adamw", **overrides):
    train(arguments(tmp_path / "run", optim, max_steps=3, save_strategy="steps", save_steps=3, **overrides))
    return str(tmp_path / "run" / "checkpoint-3")


@pytest.mark.parametrize(
    ("saved", "now", "message"),
    [
        ({"optim": "adamw_torch"}, {}, "written by another optimizer"),
        ({"optim": "galore_dominant_adamw"}, {}, "checkpoint has method=galore_dominant_adamw"),
        ({"optim_args": "rank=6,update_proj_gap=3"}, {}, "checkpoint has rank=6, this optimizer rank=4"),
        ({"optim_args": "rank=8"}, {}, "parameter groups hold"),
        ({"optim": "lowrank"}, {"optim": "lowrank", "optim_args": "rank=4,subspace=i3s"}, "subspace=dominant"),
        (
            {"optim": "lowrank", "optim_args": "rank=4,reconstruction=fira"},
            {"optim": "lowrank", "optim_args": "rank=4"},
            "reconstruction=fira",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_a_readable_error(saved, now, message, tmp_path):
    path = checkpoint(tmp_path, **saved)
    with pytest.raises(ValueError, match=message):
        train(arguments(tmp_path / "new", **{"optim": "galore_i3s_adamw", **now}), resume=path)


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    other = torch.load(checkpoint(tmp_path, optim="fira_adamw") + "/optimizer.pt", weights_only=True)
    optimizer = engine(train(arguments(tmp_path / "b", "galore_i3s_adamw", max_steps=2)))
    before = optimizer.state_dict()
    broken = {**before, "state": {**before["state"], 0: {"basis": torch.zeros(2, 2)}}}
    for bad in (other, broken):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(bad)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for key, s in before["state"].items():
            assert all(after["state"][key][name] is s[name] for name in s)


def test_other_options_warn_and_the_checkpoint_wins(tmp_path):
    path = checkpoint(tmp_path)
    options = "rank=4,update_proj_gap=5,scale=0.5,stochastic_rounding=false"  # the last of all groups
    args = arguments(tmp_path / "new", "galore_i3s_adamw", optim_args=options, learning_rate=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = train(args, resume=path)
    messages = [str(w.message) for w in caught]
    assert any("scale=0.5 was given, the checkpoint has 0.25" in m for m in messages)
    assert any("update_proj_gap=5 was given, the checkpoint has 3" in m for m in messages)
    assert sum("stochastic_rounding=False was given, the checkpoint has True" in m for m in messages) == 1
    assert any(m.startswith("lr=0.5 was given, the checkpoint has") for m in messages)
    assert engine(resumed).param_groups[0]["scale"] == 0.25


@pytest.mark.parametrize("damage", ["trainer_state.json", "optimizer.pt"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_resuming_the_last_skips_a_folder_that_a_kill_left_incomplete(damage, how, tmp_path, capfd):
    args = arguments(tmp_path / "a", "galore_i3s_adamw", save_strategy="steps", save_steps=2, max_steps=6)
    whole = train(args)
    file = tmp_path / "a" / "checkpoint-6" / damage
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    resumed = train(args, resume=True)
    assert history(resumed) == history(whole)  # from checkpoint-4 on, again
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_the_run_folder_holds_the_resolved_options(tmp_path):
    train(arguments(tmp_path, "galore_hybrid_adamw", max_steps=1))
    described = json.loads((tmp_path / "hf_lowrank.json").read_text())
    assert described["optimizer"] == "galore_hybrid_adamw"
    assert described["groups"][0]["rank"] == 4 and described["groups"][0]["on_refresh"] == "rotate"
    assert "model.layers.0.self_attn.q_proj.weight" in described["groups"][0]["param_names"]


def test_a_damaged_checkpoint_is_a_readable_error_and_stays_as_it_is(tmp_path):
    path = checkpoint(tmp_path)
    file = tmp_path / "run" / "checkpoint-3" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"optimizer.pt is missing or unreadable. Name an earlier checkpoint"):
        train(arguments(tmp_path / "new", "galore_i3s_adamw"), resume=path)
    assert file.stat().st_size == 500


def test_a_checkpoint_of_python_objects_is_a_readable_error(tmp_path):
    path = checkpoint(tmp_path)  # as transformers' galore_adamw leaves it: an object in the state
    file = tmp_path / "run" / "checkpoint-3" / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    saved["state"][0]["projector"] = pathlib.PurePosixPath("projector")
    torch.save(saved, file)
    with pytest.raises(ValueError, match=r"more than tensors and numbers \(pathlib.*\), which is not loaded"):
        train(arguments(tmp_path / "new", "galore_i3s_adamw"), resume=path)


@pytest.mark.parametrize("name", ["fira_i3s_adamw_8bit", "galore_dominant_adamw_8bit_layerwise"])
def test_eight_bit_runs_resume_bit_for_bit(name, tmp_path):
    wide = {"hidden_size": 96, "intermediate_size": 128}  # large enough that moments are quantised
    common = {"optim_args": "rank=64,update_proj_gap=3", "max_grad_norm": 0.0}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = train(arguments(tmp_path / "a", name, **common, **saving), tiny_llama(**wide))
    dtypes = {value.dtype for s in engine(whole).state.values() for value in s.values()}
    assert torch.uint8 in dtypes
    path = str(tmp_path / "a" / "checkpoint-3")
    resumed = train(arguments(tmp_path / "b", name, **common), tiny_llama(**wide), resume=path)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    same_state(engine(whole), engine(resumed))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    args = arguments(tmp_path, "galore_i3s_adamw", load_best_model_at_end=True, learning_rate=0.3, **saving)
    t = train(args, eval_dataset=tiny_data(8))
    best = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["best_model_checkpoint"]
    from safetensors.torch import load_file

    saved = load_file(f"{best}/model.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in t.model.named_parameters() if name in saved)
