"""torchtitan: its configuration, schedules, distributed checkpoints and Llama; its Trainer starts on a GPU only."""

import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import shown
from processes import torchrun
from torch.distributed import checkpoint as dcp


pytest.importorskip("torchtitan.models.llama3.config_registry", reason="torchtitan is not installed")
sys.path.insert(0, str(Path(__file__).parent))
from torchtitan.config.manager import ConfigManager  # noqa: E402
from torchtitan_worker import SAVED, SETTINGS, STEPS, built, llama, saved, train, whole  # noqa: E402

import hf_lowrank  # noqa: E402
from hf_lowrank.hf.torchtitan import LowRankContainer  # noqa: E402


WORKER = Path(__file__).parent / "torchtitan_worker.py"


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_configuration_names_it_and_the_command_line_changes_it(tmp_path, monkeypatch):
    (tmp_path / "my_run.py").write_text(shown("with/torchtitan.md", "python"))
    monkeypatch.syspath_prepend(tmp_path)
    config = ConfigManager().parse_args(["--module", "my_run", "--config", "galore", "--optimizer.lr", "0.02"])
    model = llama()
    (optimizer,) = config.optimizer.build(model_parts=[model])
    assert isinstance(optimizer, hf_lowrank.LowRankOptimizer)
    low_rank = [group for group in optimizer.param_groups if "rank" in group]
    assert {(group["method"], group["lr"], group["rank"]) for group in low_rank} == {("galore_i3s_adamw", 0.02, 64)}
    # one fused q-k-v, o, and three of the feed-forward block; embeddings and head are dense
    assert sum(len(group["params"]) for group in low_rank) == 5
    assert config.optimizer.to_dict()["options"] == {"rank": 64, "update_proj_gap": 200}  # what its logger writes


def test_it_trains_as_the_optimizer_does_by_itself():
    model, other = llama(), llama()
    settings = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "seed": 5}
    train(model, *built(model, weight_decay=0.3, **settings), range(STEPS))
    groups = hf_lowrank.param_groups(other, method="galore_i3s_adamw", weight_decay=0.3, **SETTINGS["options"])
    plain = hf_lowrank.LowRankOptimizer(groups, "galore_i3s_adamw", **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(plain, built(llama())[1].schedulers[0].lr_lambdas[0])
    train(other, plain, schedule, range(STEPS))
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("method", ["galore_i3s_adamw", "fira_i3s_adamw_8bit"])
def test_its_distributed_checkpoints_resume_exactly(method, tmp_path):
    model = llama()
    container, schedule = built(model, method=method)
    train(model, container, schedule, range(SAVED))
    dcp.save(saved(model, container, schedule), checkpoint_id=tmp_path)
    train(model, container, schedule, range(SAVED, STEPS))
    again = llama()
    container, schedule = built(again, method=method)
    dcp.load(saved(again, container, schedule), checkpoint_id=tmp_path)
    train(again, container, schedule, range(SAVED, STEPS))
    assert same(model.parameters(), again.parameters())


@pytest.mark.processes
def test_fsdp2_trains_as_one_process_and_resumes_exactly(tmp_path):
    done = torchrun(2, WORKER, tmp_path, "fsdp")
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "result.pt")
    assert same(found["trained"], found["resumed"])
    model = llama()
    start = whole(model)
    train(model, *built(model), range(STEPS))
    for one, two, zero in zip(whole(model), found["trained"], start, strict=True):
        assert (one - two).norm() <= 1e-3 * (one - zero).norm()  # sums in another order; 1e-5 was seen


def test_parts_of_a_pipeline_have_an_optimizer_each_and_one_state():
    first, second = (llama(layers=2) for _ in range(2))
    del first.layers["1"], second.layers["0"]
    first.norm = first.lm_head = second.tok_embeddings = None
    container = LowRankContainer.Config(**SETTINGS).build(model_parts=[first, second])
    assert len(container) == 2
    names = {name for part in (first, second) for name, _ in part.named_parameters()}
    keys = container.state_dict()
    assert names == {key.removeprefix("state.").removesuffix(".step") for key in keys if key.endswith(".step")}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "galore_i3s_adamw_layerwise"}, "torchtitan clips whole gradients"),
        ({"options": {"rnak": 8}}, "has no option 'rnak'; did you mean 'rank'"),
        ({"optimizer_factory_kwargs_by_name": {"AdamW": {}}}, "use method, lr and options"),
        ({"method": "adamw"}, "unknown method 'adamw'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        built(llama(), **changes)


def test_a_state_that_is_read_before_the_first_step_leaves_the_weights():
    """torchtitan makes it by a step with zero gradients at a learning rate of zero."""
    model = llama()
    before = deepcopy(model.state_dict())
    container = LowRankContainer.Config(**SETTINGS).build(model_parts=[model])
    assert any(key.endswith(".basis") for key in container.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {group["lr"] for optimizer in container for group in optimizer.param_groups} == {SETTINGS["lr"]}
