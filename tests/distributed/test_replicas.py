"""Sharded state under DistributedDataParallel, ZeroRedundancyOptimizer, and processes that come apart, on gloo."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import pytest
import torch
from processes import reported
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import METHODS, LowRankOptimizer, param_groups
from hf_lowrank.engine.schedule import owners
from hf_lowrank.hf.models import llama_config


sys.path.insert(0, str(Path(__file__).parent))
import models  # noqa: E402
import worker_killed  # noqa: E402


pytestmark = pytest.mark.processes
WORKER = Path(__file__).parent / "worker_replicas.py"
FEW = ["galore_i3s_adamw", "fira_adamw", "online_subspace_adamw", "galore_dominant_adamw_8bit"]
ALL = list(METHODS)
UP = "blocks.0.up.weight"


def launch(check, processes, names, tmp_path):
    results = reported(processes, WORKER, tmp_path / f"{check}-{processes}.json", *names, check=check)
    assert list(results) == list(names)
    return results


@pytest.mark.parametrize(
    "processes, names",
    [pytest.param(2, FEW, id="2"), pytest.param(4, ALL, id="4 all", marks=pytest.mark.full)],
)
def test_sharded_state_is_plain_ddp_bit_for_bit_and_every_parameter_has_one_owner(processes, names, tmp_path):
    for name, figures in launch("shard", processes, names, tmp_path).items():
        assert figures["equal to plain"] and figures["same weights"], name
        assert figures["one owner each"] and figures["same file"], name
        assert figures["bytes"] == figures["declared"] and sum(figures["bytes"]) == figures["whole"], name


def test_sharded_state_resumes_everywhere_and_everything_resumes_onto_it(tmp_path):
    for name, figures in launch("resume", 2, FEW, tmp_path).items():
        assert figures == dict.fromkeys(figures, True) and len(figures) == 5, (name, figures)


@pytest.mark.full
def test_it_resumes_onto_another_number_of_processes(tmp_path):
    launch("resume", 2, FEW, tmp_path)
    for name, figures in launch("elsewhere", 4, FEW, tmp_path).items():
        assert figures == {"shard_state": True, "share_refreshes": True}, name


def test_torchs_zero_redundancy_optimizer_around_ours_equals_one_process(tmp_path):
    for name, figures in launch("zero", 2, ["galore_random_adamw", "fira_adamw"], tmp_path).items():
        assert figures["buckets False"] and figures["buckets True"] and figures["same state"], name
        assert all(figures["shared out"]), name


def one_sentence(raised, *names):
    """Whether every process raised an error of one sentence, with all of these words."""
    return all(
        text.startswith("ValueError: ") and text.count(". ") == 0 and all(name in text for name in names)
        for text in raised
    )


def quiet(raised):
    return raised == ["", ""]


def test_processes_that_come_apart_are_told_so_together_and_nobody_waits(tmp_path):
    found = launch_apart("apart", tmp_path)
    shared, sharded, alone = found["other weights"]
    assert one_sentence(shared, UP, "share_refreshes=False", "DTensors") and one_sentence(sharded, UP) and quiet(alone)
    for raised in found["other parameters"]:
        assert one_sentence(raised, "is not the same on all processes")
    for raised in found["other options"]:
        assert one_sentence(raised, "scale=0.25 on process 0, scale=0.5 on process 1")
    for case in ("nan", "nan, late", "missing"):
        assert one_sentence(found[case], UP, "reduce gradients"), case
    assert one_sentence(found["missing, dense"], "norm.weight") and one_sentence(found["missing, all"])
    assert quiet(found["alike"])
    owners = found["owners decide"]
    assert quiet(owners["raised"]) and owners["same"]
    # each of 17 parameters has a NaN once, seen by the second process alone: which skips those that it owns
    assert owners["skipped"] == round(17 * (1 - owners["owned"]))
    norm, displacement = found["clipped"]
    assert norm < 1e-12 and displacement < 1e-6  # the sum of squares in another order, in float64
    assert found["grows"] == [True, True]


def test_sharded_state_is_gathered_before_it_is_saved_and_refused_where_it_does_not_fit(tmp_path):
    found = launch_apart("files", tmp_path)
    unsaid = "RuntimeError: this process holds only a part of the state (shard_state)"
    assert quiet(found["before"]) and quiet(found["plain"]) and found["copied"]
    assert all(text.startswith(unsaid) for text in found["apart"] + found["stale"])
    assert found["gathered"][0] == "" and found["gathered"][1].startswith(unsaid)
    assert one_sentence(found["nobody"], "0 to 1")
    assert one_sentence(found["layerwise"], "shard_state", "FSDP2") and one_sentence(found["FSDP2"], "shard_state")
    held, same, gathered = found["few"]
    assert (held, same) == (1, True) and gathered[0] == ""


def test_under_fsdp2_a_missing_gradient_is_told_and_one_that_is_not_finite_is_skipped_by_all(tmp_path):
    found = launch_apart("fsdp", tmp_path)
    assert one_sentence(found["missing"]["raised"], UP) and one_sentence(found["missing, all"]["raised"])
    assert quiet(found["nan"]["raised"]) and found["nan"]["same"] and found["nan"]["skipped"] == 1
    assert quiet(found["alike"]["raised"]) and found["alike"]["skipped"] == 0


def launch_apart(check, tmp_path):
    return reported(2, Path(__file__).parent / "worker_apart.py", tmp_path / "found.json", check=check)


@pytest.mark.parametrize("mode", ["shard_state", pytest.param("share_refreshes", marks=pytest.mark.full)])
def test_a_killed_process_ends_the_others_and_the_checkpoint_resumes(mode, tmp_path):
    worker = Path(__file__).parent / "worker_killed.py"
    command = [sys.executable, str(worker), str(tmp_path), mode]
    several = [
        subprocess.Popen(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        several[1].wait(timeout=120)
        ended = perf_counter()
        error = several[0].communicate(timeout=120)[1]
        waited = perf_counter() - ended
    finally:
        for process in several:
            process.kill()
    assert several[1].returncode == -signal.SIGKILL
    assert several[0].returncode != 0 and "Error" in error
    assert waited < worker_killed.TIMEOUT + 10  # the timeout of the processes, and the end of a Python process
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    net, alone = models.model(), models.model()
    opt, other = (models.optimizer(x, worker_killed.NAME) for x in (net, alone))
    net.load_state_dict(saved["weights"])
    opt.load_state_dict(saved["optimizer"])
    models.train(net, opt, 2, start=worker_killed.SAVED)
    models.train(alone, other, worker_killed.SAVED + 2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize(
    "method, worlds",
    [("galore_i3s_adamw", (2, 3, 4, 8)), ("apollo_random_adamw", (2, 3, 4)), ("fira_adamw_8bit", (2, 3, 4))],
)
def test_every_process_holds_its_share_of_the_state_of_a_llama(method, worlds):
    """The 1B model of the papers, whose embedding and head are the largest that one process keeps."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**llama_config("1b")))
    optimizer = LowRankOptimizer(param_groups(model, method=method, rank=512), method)
    sizes = [float(plan.nbytes) for *_, plan in optimizer.declared()]
    for world in worlds:
        held = [0.0] * world
        for size, owner in zip(sizes, owners(sizes, world), strict=True):
            held[owner] += size
        assert all(abs(own * world / sum(sizes) - 1) < 0.1 for own in held), (world, held)


def test_what_has_an_owner_keeps_it():
    costs = [5.0, 4.0, 3.0, 2.0]
    assert owners(costs, 2) == [0, 1, 1, 0]
    assert owners(costs, 2, {3: 1, 2: 1}) == [0, 0, 1, 1]
    assert owners([1.0, 1.0, 9.0], 2, {0: 0, 1: 1}) == [0, 1, 0]  # added last, it moves nothing


def test_with_nobody_to_share_with_the_state_is_whole(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 8))
        groups = param_groups(net, method="galore_i3s_adamw", rank=2)
        optimizer = LowRankOptimizer(groups, "galore_i3s_adamw", shard_state=True)
        net(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        state = optimizer.state_dict()["state"]  # nobody was asked to gather it
    finally:
        torch.distributed.destroy_process_group()
    assert {int(s["step"]) for s in state.values()} == {1} and len(state) == 4
