"""LLaMA-Factory v1: its own trainer on a tiny model, from a configuration as its command line reads it."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import shown, tiny_llama
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast

import hf_lowrank


pytest.importorskip("llamafactory.v1.core.base_trainer", reason="LLaMA-Factory is not installed")
from llamafactory.v1.plugins.trainer_plugins.optimizer import OptimizerPlugin  # noqa: E402
from llamafactory.v1.trainers import sft_trainer  # noqa: E402

from hf_lowrank.hf import llamafactory  # noqa: E402


WORDS = ["<|im_start|>", "<|im_end|>", "user", "assistant", "who", "are", "you", "I", "am", "a", "model"]
OPTIM = {**yaml.safe_load(shown("with/llamafactory.md", "yaml"))["optim_config"], "rank": 4, "update_proj_gap": 2}


@pytest.fixture
def configuration(tmp_path):
    """A model, a tokenizer and data on disk, and what a YAML file would say of them."""
    vocabulary = {word: index for index, word in enumerate(["[UNK]", "[PAD]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_llama().save_pretrained(tmp_path / "model")
    said = {"user": " who are you ", "assistant": " I am a model "}
    messages = [{"role": role, "content": [{"type": "text", "value": text}]} for role, text in said.items()]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages}] * 16))
    return {
        "model": str(tmp_path / "model"),
        "template": "chatml",
        "train_dataset": str(tmp_path / "data.json"),
        "output_dir": str(tmp_path / "out"),
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "max_steps": 6,
        "batching_workers": 0,
        "bf16": False,
        "optim_config": OPTIM,
    }


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.fixture(autouse=True)
def not_shared():
    """Leave no state of accelerate's to the next test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_its_trainer_trains_and_resumes_exactly(configuration, tmp_path):
    llamafactory.register()
    sft_trainer.run_sft({**configuration, "save_steps": 3})
    whole = weights(tmp_path / "out")
    before = weights(tmp_path / "model")
    assert all(not torch.equal(whole[key], before[key]) for key in whole)
    state = torch.load(tmp_path / "out" / "checkpoint-3" / "optimizer" / "state_dict.pt", weights_only=True)
    groups = [group for group in state["param_groups"] if "rank" in group]
    assert {(g["method"], g["rank"], g["lr"], g["weight_decay"]) for g in groups} == {
        (OPTIM["name"], 4, OPTIM["lr"], 0.1)
    }
    assert sum(len(group["params"]) for group in groups) == 14  # seven of each layer
    resume = str(tmp_path / "out" / "checkpoint-3")
    sft_trainer.run_sft({**configuration, "output_dir": str(tmp_path / "b"), "resume_from_checkpoint": resume})
    assert all(torch.equal(value, whole[key]) for key, value in weights(tmp_path / "b").items())


@pytest.mark.processes
def test_its_command_line_finds_the_names_by_itself(configuration, tmp_path):
    """On one process: its loop asks for an accelerator's stream where there are several."""
    (tmp_path / "run.yaml").write_text(json.dumps(configuration))
    on = {"USE_V1": "1", "HF_LOWRANK_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llamafactory.cli", "sft", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env={**os.environ, **on}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    llamafactory.register()
    sft_trainer.run_sft({**configuration, "output_dir": str(tmp_path / "here")})
    here, there = weights(tmp_path / "here"), weights(tmp_path / "out")
    assert all(torch.equal(value, there[key]) for key, value in here.items())


def test_refreshes_are_shared_out_under_ddp_alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, replicated = tiny_llama(), DistributedDataParallel(tiny_llama())
        assert not llamafactory.build(plain, OPTIM).share_refreshes
        optimizer = llamafactory.build(replicated, OPTIM)
        assert optimizer.share_refreshes
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        assert sorted(names) == sorted(name for name, _ in plain.named_parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lr": None}, "optim_config needs lr"),
        ({"rnak": 8}, "has no option 'rnak'; did you mean 'rank'"),
        ({"name": "galore_i3s_adamw_layerwise"}, "LLaMA-Factory clips whole gradients"),
        ({"lr": "1e-2"}, "lr must be a number"),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes, sentence):
    config = {key: value for key, value in {**OPTIM, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=sentence):
        llamafactory.build(tiny_llama(), config)


def test_deepspeed_is_refused(monkeypatch):
    """As its engine leaves accelerate's state before it asks for an optimizer."""
    monkeypatch.setitem(AcceleratorState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="does not run under DeepSpeed.*fsdp2"):
        llamafactory.build(tiny_llama(), OPTIM)


def test_registering_twice_and_a_name_that_came_later(monkeypatch):
    llamafactory.register()
    monkeypatch.setitem(hf_lowrank.METHODS, "later_adamw", hf_lowrank.METHODS["galore_i3s_adamw"])
    llamafactory.register()
    assert isinstance(
        OptimizerPlugin("later_adamw")(tiny_llama(), {**OPTIM, "name": "later_adamw"}), hf_lowrank.LowRankOptimizer
    )
