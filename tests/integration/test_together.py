"""Two processes of Trainer that were not started alike, whose optimizer came as a pair, or of which one was killed."""

import json
import logging
from pathlib import Path

import pytest
from conftest import arguments, train
from processes import reported
from transformers import trainer as transformers_trainer

from hf_lowrank.hf import checkpoints


WORKER = Path(__file__).parent / "together_worker.py"
NAME = "galore_i3s_adamw"


@pytest.mark.processes
def test_processes_that_were_started_with_other_settings_all_end_with_the_sentence_that_names_one(tmp_path):
    found = reported(2, WORKER, tmp_path / "found.json", tmp_path, check="settings")
    assert found.pop("the same") == ["", ""]
    shown = {
        "optim": ("optim='galore_i3s_adamw'", "optim='fira_adamw'"),
        "layerwise": ("optim='galore_i3s_adamw'", "optim='galore_i3s_adamw_layerwise'"),
        "lr": ("lr=0.01", "lr=0.02"),
        "weight_decay": ("weight_decay=0.0", "weight_decay=0.1"),
        "seed": ("seed=1", "seed=2"),
    }
    for name in ("scale", "update_proj_gap", "reduce_projected", "shard_state"):
        shown[name] = ("optim_args='rank=4,", name)
    assert found.keys() == shown.keys()
    for name, (text, another) in found.items():
        assert text == another and text.startswith("ValueError: the processes were not started with the same"), name
        assert all(words in text for words in shown[name]), (name, text)


@pytest.mark.processes
def test_a_pair_trains_what_the_flag_does(tmp_path):
    found = reported(2, WORKER, tmp_path / "found.json", tmp_path, check="pairs")
    sharded = found.pop(f"{NAME}-shard_state")
    assert sharded["equal"] == [True, True] and sharded["same"]
    assert all("call hf_lowrank.register() before training" in text for text in sharded["raised"])
    assert len(found) == 2
    for case, figures in found.items():
        assert figures == {"equal": [True] * 3, "raised": ["", ""], "same": True}, case


@pytest.mark.processes
@pytest.mark.skipif(
    not hasattr(transformers_trainer, "_OPTIMIZER_HANDLERS"), reason="before 5.2 nothing resumes under DDP on a CPU"
)
def test_a_checkpoint_that_lacks_the_generator_of_a_killed_process_is_skipped(tmp_path):
    found = reported(2, WORKER, tmp_path / "found.json", tmp_path, check="killed")
    assert found["said"] == ["", "1 of 2 processes have written their rng_state"]
    assert found["equal"] and found["same"]


def test_such_a_checkpoint_resumes_with_a_warning_where_it_is_named(tmp_path, caplog):
    args = arguments(tmp_path, NAME, save_strategy="steps", save_steps=2, max_steps=4)
    train(args)
    last = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(last.read_text())
    assert state["stateful_callbacks"][checkpoints.SAVED][checkpoints.GENERATORS] == 1
    state["stateful_callbacks"][checkpoints.SAVED][checkpoints.GENERATORS] = 2
    last.write_text(json.dumps(state))
    with caplog.at_level(logging.WARNING, "hf_lowrank"):
        train(args, resume=str(last.parent))
    assert "1 of 2 processes have written their rng_state; random numbers are not those" in caplog.text


def test_where_every_node_has_a_folder_its_own_processes_write_into_it(tmp_path, monkeypatch):
    args = arguments(tmp_path, NAME, save_on_each_node=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert checkpoints.generators_saved_by(args) == 8
    args.save_on_each_node = False
    assert checkpoints.generators_saved_by(args) == args.world_size == 1
