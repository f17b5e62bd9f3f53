"""The names in TrainingArguments: where they must appear, and that everything else stays as it was."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import arguments, engine, tiny_data, tiny_llama, train
from transformers import HfArgumentParser, Trainer, TrainingArguments, trainer
from transformers.training_args import OptimizerNames

import hf_lowrank
from hf_lowrank.methods import resolve


def fresh_process(code, *argv):
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", resolve.names())
def test_every_name_is_an_optimizer_name(name, tmp_path):
    member = OptimizerNames(name)
    assert member == name and member.value == name and member in OptimizerNames and member in list(OptimizerNames)
    assert getattr(OptimizerNames, name.upper()) is OptimizerNames[name.upper()] is member
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    args = arguments(tmp_path, name)
    assert args.optim is member and args.to_dict()["optim"] == name and name in args.to_json_string()


def test_the_parser_offers_and_reads_them(tmp_path, capsys):
    parser = HfArgumentParser(TrainingArguments)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--help"])
    assert "galore_i3s_adamw" in capsys.readouterr().out
    flags = ["--output_dir", str(tmp_path), "--optim", "fira_i3s_adamw", "--use_cpu", "True"]
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(flags)
    assert args.optim == "fira_i3s_adamw"


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_configuration_files_name_them(kind, tmp_path):
    values = {
        "output_dir": str(tmp_path),
        "optim": "galore_hybrid_adamw",
        "optim_args": "rank=8,r0=2",
        "use_cpu": True,
    }
    file = tmp_path / f"args.{kind}"
    file.write_text(json.dumps(values))  # JSON is YAML
    parser = HfArgumentParser(TrainingArguments)
    (args,) = parser.parse_json_file(str(file)) if kind == "json" else parser.parse_yaml_file(str(file))
    assert args.optim == "galore_hybrid_adamw" and args.optim_args == "rank=8,r0=2"


def test_an_unknown_name_is_still_refused_with_ours_among_the_valid(tmp_path):
    with pytest.raises(ValueError, match="galore_i3s_adamw"):
        TrainingArguments(str(tmp_path), optim="galore_i3s_adam")


def test_registering_twice_is_once_and_unregister_undoes_it():
    hf_lowrank.unregister()
    before = (list(OptimizerNames), vars(Trainer)["get_optimizer_cls_and_kwargs"], list(trainer.DEFAULT_CALLBACKS))
    lookup = trainer.get_last_checkpoint
    handlers = dict(getattr(trainer, "_OPTIMIZER_HANDLERS", {}))
    assert not set(resolve.names()) & {member.value for member in OptimizerNames}
    hf_lowrank.register()
    hf_lowrank.register()
    names = [member.value for member in OptimizerNames]
    assert len(names) == len(set(names)) == len(before[0]) + len(resolve.names())
    assert len(trainer.DEFAULT_CALLBACKS) == len(before[2]) + 1
    hf_lowrank.unregister()
    hf_lowrank.unregister()
    after = (list(OptimizerNames), vars(Trainer)["get_optimizer_cls_and_kwargs"], list(trainer.DEFAULT_CALLBACKS))
    assert after == before and trainer.get_last_checkpoint is lookup
    assert dict(getattr(trainer, "_OPTIMIZER_HANDLERS", {})) == handlers
    with pytest.raises(ValueError, match="galore_i3s_adamw"):
        OptimizerNames("galore_i3s_adamw")


def test_names_of_transformers_are_never_shadowed():
    hf_lowrank.unregister()
    theirs = {member.value for member in OptimizerNames}
    assert not theirs & set(resolve.names())


def test_a_run_with_another_optimizer_is_exactly_as_without_us(tmp_path):
    hf_lowrank.unregister()
    without = train(arguments(tmp_path / "without", "adamw_torch"))
    hf_lowrank.register()
    with_us = train(arguments(tmp_path / "with", "adamw_torch"))
    timing = ("runtime", "per_second")
    histories = [
        [{k: v for k, v in row.items() if not any(t in k for t in timing)} for row in t.state.log_history]
        for t in (without, with_us)
    ]
    assert histories[0] == histories[1]
    assert type(engine(with_us)) is type(engine(without)) is torch.optim.AdamW
    assert all(torch.equal(a, b) for a, b in zip(without.model.parameters(), with_us.model.parameters(), strict=True))
    assert not any((tmp_path / "with").glob("hf_lowrank*"))


@pytest.mark.processes
def test_training_args_bin_is_read_by_a_process_that_imports_nothing_of_ours(tmp_path):
    torch.save(arguments(tmp_path, "galore_i3s_adamw"), tmp_path / "training_args.bin")
    code = """
import sys, torch
args = torch.load(sys.argv[1], weights_only=False)
from transformers import Trainer
assert args.optim == "galore_i3s_adamw"
kwargs = Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.Sequential(torch.nn.Linear(8, 8)))[1]
print("method:", kwargs["method"])
"""
    result = fresh_process(code, str(tmp_path / "training_args.bin"))
    assert "method: galore_i3s_adamw" in result.stdout, result.stderr


@pytest.mark.processes
def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = """
import sys, hf_lowrank
from hf_lowrank.methods.table import METHODS
assert METHODS["galore_i3s_adamw"].paper and dir(hf_lowrank)
print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""
    result = fresh_process(code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_model_card_names_the_optimizer(tmp_path):
    t = train(arguments(tmp_path, "galore_i3s_adamw", max_steps=1))
    t.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "galore_i3s_adamw".upper() in card.upper() and "rank=4" in card


def test_lowrank_trainer_builds_the_optimizer_without_the_replaced_function(tmp_path):
    args = arguments(tmp_path, "fira_adamw", max_steps=2)
    with_patch = train(args)
    hf_lowrank.unregister()
    alone = train(args, trainer_class=hf_lowrank.LowRankTrainer)
    assert type(engine(alone)) is hf_lowrank.LowRankOptimizer
    assert "lowrank/refreshes" in alone.state.log_history[0]
    assert all(torch.equal(a, b) for a, b in zip(with_patch.model.parameters(), alone.model.parameters(), strict=True))


def test_lowrank_trainer_leaves_other_optimizers_to_trainer(tmp_path):
    t = train(arguments(tmp_path, "adamw_torch", max_steps=1), trainer_class=hf_lowrank.LowRankTrainer)
    assert type(engine(t)) is torch.optim.AdamW


def test_optimizer_cls_and_kwargs_needs_no_registration(tmp_path):
    registered = train(arguments(tmp_path, "galore_i3s_adamw", max_steps=3))
    hf_lowrank.unregister()
    args, model = arguments(tmp_path, "adamw_torch", max_steps=3), tiny_llama()
    pair = hf_lowrank.optimizer_cls_and_kwargs(model, "galore_i3s_adamw", args=args, rank=4, update_proj_gap=3)
    direct = train(args, model, optimizer_cls_and_kwargs=pair)
    weights = (registered.model.parameters(), direct.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_the_ipython_extension_registers_and_unregisters():
    from IPython.testing.globalipapp import start_ipython

    hf_lowrank.unregister()
    shell = start_ipython()
    shell.run_line_magic("load_ext", "hf_lowrank")
    assert OptimizerNames("galore_i3s_adamw")
    shell.run_line_magic("unload_ext", "hf_lowrank")
    assert "galore_i3s_adamw" not in {member.value for member in OptimizerNames}


def test_a_second_trainer_on_the_same_model_works(tmp_path):
    model = tiny_llama()
    first = train(arguments(tmp_path / "1", "fira_i3s_adamw"), model)
    after_first = [p.clone() for p in model.parameters()]
    second = train(arguments(tmp_path / "2", "galore_dominant_adamw"), model)
    assert engine(first) is not engine(second)
    assert not any(torch.equal(a, b) for a, b in zip(after_first, model.parameters(), strict=True) if a.dim() == 2)


def test_the_same_trainer_can_train_twice(tmp_path):
    t = Trainer(tiny_llama(), arguments(tmp_path, "galore_i3s_adamw"), train_dataset=tiny_data())
    t.train()
    t.train()
    assert t.state.global_step == 8


def test_asked_without_a_model_the_class_refuses_groups_that_say_nothing_of_a_subspace(tmp_path):
    """LLaMA-Factory asks so to read lr, betas and eps; with plain groups all was trained dense, unsaid."""
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, "galore_i3s_adamw"))
    assert {"lr", "betas", "eps"} <= kwargs.keys()
    model = tiny_llama()
    plain = [{"params": list(model.parameters()), "weight_decay": 0.1}]  # as transformers' examples split them
    for params in (model.parameters(), plain):
        with pytest.raises(ValueError, match="was asked without a model, so no group says which"):
            cls(params, **kwargs)
    groups = hf_lowrank.param_groups(model, method="galore_i3s_adamw", rank=4)
    assert "rank" in cls(groups, **kwargs).param_groups[0]


def test_groups_of_ones_own_beside_those_of_trainer_are_refused_in_a_sentence(tmp_path):
    model = tiny_llama()
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, "galore_i3s_adamw"), model)
    with pytest.raises(TypeError, match=r"has split the model into groups already"):
        cls([{"params": list(model.parameters())}], **kwargs)
    assert "rank" in cls(**kwargs).param_groups[0]
