"""The ways to start a script, each in a process of its own."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hf_lowrank import __main__ as launcher


pytestmark = pytest.mark.processes

SCRIPT = '''
"""A script in the shape of transformers' examples; it knows nothing of hf_lowrank."""
import json, os, sys
import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def main():
    parser = HfArgumentParser(TrainingArguments)
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        (args,) = parser.parse_json_file(sys.argv[1])
    else:
        (args,) = parser.parse_args_into_dataclasses()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=32)
    model = LlamaForCausalLM(config)
    data = [{"input_ids": x, "labels": x} for x in torch.randint(0, 32, (32, 12))]
    trainer = Trainer(model, args, train_dataset=data)
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    bases = [s["basis"].double().sum().item() for s in optimizer.state.values() if "basis" in s]
    weights = [p.double().sum().item() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]
    report = {"optimizer": type(optimizer).__name__, "bases": bases, "weights": weights, "argv0": sys.argv[0],
              "world": args.world_size, "name": __name__}
    with open(os.path.join(args.output_dir, f"report-{args.process_index}.json"), "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "helper_next_to_script.py").write_text("VALUE = 1\n")
    (folder / "train_tiny.py").write_text("import helper_next_to_script\n" + SCRIPT)
    return folder / "train_tiny.py"


def flags(out, optim="galore_i3s_adamw"):
    options = ["--optim_args", "rank=4,update_proj_gap=3"] if optim != "adamw_torch" else []
    common = "--max_steps 5 --per_device_train_batch_size 4 --report_to none --use_cpu True --save_strategy no"
    return ["--output_dir", str(out), "--optim", optim, *options, *common.split()]


def launch(command, cwd, **env):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **env}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def reports(out, result, count=1):
    files = sorted(Path(out).glob("report-*.json"))
    assert len(files) == count, result.stderr[-3000:]
    return [json.loads(file.read_text()) for file in files]


PYTHON = [sys.executable, "-m", "hf_lowrank"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes"]


def test_a_script_under_python(script, tmp_path):
    out = tmp_path / "out"
    result = launch([*PYTHON, script, *flags(out)], tmp_path)
    (report,) = reports(out, result)
    assert report["optimizer"] == "LowRankOptimizer" and report["argv0"] == str(script)
    assert "galore_i3s_adamw: 7 matrices at rank 4" in result.stderr


def test_a_module_under_python(script, tmp_path):
    result = launch([*PYTHON, "-m", "train_tiny", *flags(tmp_path / "out")], script.parent)
    (report,) = reports(tmp_path / "out", result)
    assert report["optimizer"] == "LowRankOptimizer" and report["name"] == "__main__"


def test_a_json_configuration(script, tmp_path):
    words = flags(tmp_path / "out")
    values = {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)}
    values |= {"max_steps": 5, "per_device_train_batch_size": 4, "use_cpu": True}
    (tmp_path / "args.json").write_text(json.dumps(values))
    result = launch([*PYTHON, script, tmp_path / "args.json"], tmp_path)
    (report,) = reports(tmp_path / "out", result)
    assert report["optimizer"] == "LowRankOptimizer"


def test_torchrun_with_two_processes_keeps_them_identical(script, tmp_path):
    out = tmp_path / "out"
    result = launch([*TORCHRUN, "-m", "hf_lowrank", script, *flags(out, "fira_i3s_adamw")], tmp_path)
    first, second = reports(out, result, count=2)
    assert first["world"] == 2 and first["optimizer"] == second["optimizer"] == "LowRankOptimizer"
    assert first["bases"] == second["bases"] and first["weights"] == second["weights"]
    assert result.stderr.count("matrices at rank") == 1  # the main process alone says so


def test_accelerate_launch(script, tmp_path):
    out = tmp_path / "out"
    result = launch([*ACCELERATE, "1", "-m", "hf_lowrank", script, *flags(out)], tmp_path)
    (report,) = reports(out, result)
    assert report["optimizer"] == "LowRankOptimizer"


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 3}], ids=lambda zero: f"stage-{zero['stage']}")
@pytest.mark.parametrize("own", [False, True], ids=["our-optimizer", "an-optimizer-of-its-own"])
def test_deepspeed_is_refused(own, zero, script, tmp_path):
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero}
    if own:  # DeepSpeed builds it, and asks nobody for ours
        config["optimizer"] = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    words = ["--use_deepspeed", "--deepspeed_config_file", tmp_path / "ds.json", "--num_processes", "1"]
    result = launch([*ACCELERATE[:3], *words, "-m", "hf_lowrank", script, *flags(tmp_path / "out")], tmp_path)
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("python -m hf_lowrank: ")]
    assert "galore_i3s_adamw does not run under DeepSpeed" in line and "use FSDP2 (--fsdp" in line
    assert not (tmp_path / "out" / "report-0.json").exists()


def test_autoload_is_opt_in(script, tmp_path):
    on = launch([sys.executable, script, *flags(tmp_path / "on")], tmp_path, HF_LOWRANK_AUTOLOAD="1")
    (report,) = reports(tmp_path / "on", on)
    assert report["optimizer"] == "LowRankOptimizer"
    off = launch([sys.executable, script, *flags(tmp_path / "off")], tmp_path)
    assert off.returncode == 2 and "invalid choice: 'galore_i3s_adamw'" in off.stderr
    idle = launch([sys.executable, "-c", "import sys, torch; print('transformers' in sys.modules)"], tmp_path)
    assert idle.stdout.strip() == "False"


def test_autoload_where_torch_is_first_imported_by_the_arguments(tmp_path):
    """As in `trl sft`: they have begun to run when torch calls the package, and are all that a parser needs."""
    code = "from transformers import TrainingArguments as T; print(T('out', optim='galore_i3s_adamw').optim.value)"
    found = launch([sys.executable, "-c", code], tmp_path, HF_LOWRANK_AUTOLOAD="1")
    assert found.stdout.strip() == "galore_i3s_adamw", found.stderr


def test_another_optimizer_under_the_launcher(script, tmp_path):
    result = launch([*PYTHON, script, *flags(tmp_path / "out", "adamw_torch")], tmp_path)
    (report,) = reports(tmp_path / "out", result)
    assert report["optimizer"] == "AdamW" and not list((tmp_path / "out").glob("hf_lowrank*"))


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--help"], 0, "galore_i3s_adamw"),
        ([], 2, "usage: python -m hf_lowrank"),
        (["--version"], 0, "hf_lowrank 0"),
        (["absent.py"], 2, "no such script: absent.py"),
        (["-m", "absent.module"], 2, "no such module: absent.module"),
        (["-m"], 2, "expected a script or -m MODULE"),
        (["--optim", "x"], 2, "expected a script or -m MODULE"),
        (["--local-metrics"], 2, "expected a script or -m MODULE"),
        (["--local-metrics", "--optim", "x"], 2, "got '--local-metrics --optim x'"),
    ],
)
def test_the_launcher_itself(words, code, text, tmp_path):
    result = launch([*PYTHON, *words], tmp_path)
    assert result.returncode == code and text in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_what_the_package_refuses_is_one_sentence(script, tmp_path):
    words = flags(tmp_path / "out")
    words[words.index("--optim_args") + 1] = "rnak=4"
    result = launch([*PYTHON, script, *words], tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("python -m hf_lowrank: ") and "did you mean 'rank'?" in last


def test_an_error_of_the_script_is_left_alone(tmp_path, monkeypatch):
    script = tmp_path / "broken.py"
    script.write_text("raise ValueError('mine')\n")
    monkeypatch.setattr(sys, "argv", ["hf_lowrank", str(script)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match="mine"):
        launcher.main()
