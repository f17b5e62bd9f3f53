"""axolotl: `python -m axolotl.cli.train run.yaml` on a tiny model, and what the plug-in refuses."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import shown, tiny_llama
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.training_args import OptimizerNames

import hf_lowrank


base = pytest.importorskip("axolotl.integrations.base", reason="axolotl is not installed")
PLUGIN = "hf_lowrank.hf.axolotl.LowRankPlugin"
OPTIM = yaml.safe_load(shown("with/axolotl.md", "yaml"))
OPTIM["optim_args"] |= {"rank": 4, "update_proj_gap": 3}


@pytest.fixture
def configuration(tmp_path):
    """A model, a tokenizer and data on disk, and what a YAML file says of them."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[EOS]", "[UNK]", "the", "cat", "sees", "a", "dog"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = {"pad_token": "[PAD]", "eos_token": "[EOS]", "bos_token": "[EOS]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **ends).save_pretrained(tmp_path / "model")
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(f"{json.dumps({'text': 'the cat sees a dog the dog sees a cat'})}\n" * 32)
    return {
        "base_model": str(tmp_path / "model"),
        **OPTIM,
        "weight_decay": 0.1,
        "datasets": [{"path": str(tmp_path / "data.jsonl"), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "out"),
        "sequence_len": 32,
        "micro_batch_size": 2,
        "max_steps": 6,
        "save_steps": 4,
        "val_set_size": 0,
        "bf16": False,
        "tf32": False,
    }


def run(configuration, folder):
    (folder / "run.yaml").write_text(yaml.safe_dump(configuration))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "axolotl.cli.train", str(folder / "run.yaml")]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.processes
def test_a_run_of_its_command_line_resumes_exactly(configuration, tmp_path):
    done = run(configuration, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = json.loads((tmp_path / "out" / "hf_lowrank.json").read_text())
    assert OPTIM["optimizer"] in json.dumps(settings)
    whole, checkpoint = load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "out" / "checkpoint-4"
    groups = torch.load(checkpoint / "optimizer.pt", weights_only=True)["param_groups"]
    assert {(g["rank"], g["initial_lr"], g["weight_decay"]) for g in groups if "rank" in g} == {
        (4, OPTIM["learning_rate"], 0.1)
    }
    again = {**configuration, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(checkpoint)}
    done = run(again, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


@pytest.fixture
def plugin():
    hf_lowrank.unregister()
    manager = base.PluginManager.get_instance()
    manager.register(PLUGIN)
    return manager.plugins[PLUGIN]


def test_its_manager_loads_the_plug_in_which_registers_the_names(plugin):
    assert "galore_i3s_adamw" not in set(OptimizerNames)
    plugin.register(OPTIM)
    assert OptimizerNames("galore_i3s_adamw") == "galore_i3s_adamw"


@pytest.mark.parametrize("key", ["embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio"])
def test_settings_that_axolotl_would_drop_are_refused(key, plugin):
    with pytest.raises(ValueError, match=f"{key}: axolotl does not apply it to galore_i3s_adamw.*embedding_lr below"):
        plugin.register({**OPTIM, key: 1e-4})
    plugin.register({"optimizer": "adamw_torch", key: 1e-4})
