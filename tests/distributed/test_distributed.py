"""DistributedDataParallel and FSDP2 on gloo: equal to one process, with the work shared as promised."""

import json
from pathlib import Path

import pytest
from processes import torchrun

from hf_lowrank import METHODS, methods


pytestmark = pytest.mark.processes
WORKER = Path(__file__).parent / "worker.py"
MATRICES = 10  # of the test model: five in each of two blocks, the stacks of experts among them
TOLERANCE = {"galore_uniform_adamw": 2e-2}
"""1e-3 of the displacement, but for the rule that gives the smallest singular vectors equal weight: what the gradient
has there is the rounding of its sums, which differs between one process and several, and Adam blows it up."""


def launch(check, processes, tmp_path):
    output = tmp_path / f"{check}-{processes}.json"
    result = torchrun(processes, WORKER, check, output)
    assert output.exists(), result.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.full)])
def test_ddp_equals_one_process_and_shares_the_refreshes(processes, tmp_path):
    results = launch("ddp", processes, tmp_path)
    assert set(results) == set(METHODS)
    for name, figures in results.items():
        assert figures["displacement"] < TOLERANCE.get(name, 1e-3), name
        assert figures["same bases"] and figures["same weights"], name
        assert figures["refreshes"] == figures["refreshes of one process"] == 3 * MATRICES, name
        assert figures["most on one"] < 3 * MATRICES, name
        assert figures["generator untouched"], name


@pytest.mark.parametrize("processes", [2, 3])
def test_fsdp2_equals_the_unsharded_run(processes, tmp_path):
    results = launch("fsdp", processes, tmp_path)  # 3: pieces of 4, 4, 2 rows and empty ones
    for name, figures in results.items():
        assert figures["displacement"] < TOLERANCE.get(name, 1e-3), name
        assert figures["layerwise"] < TOLERANCE.get(name, 1e-3), name
        assert figures["same bases"], name
        along_gradient = methods.parts(name, {}).reconstruction.needs_gradient
        wide = 4  # down_proj and k_proj of two blocks: their rows are split
        assert figures["collectives"] == expected(wide, along_gradient), name


def test_sharded_and_whole_weights_go_together(tmp_path):
    results = launch("mixed", 3, tmp_path)
    for name, figures in results.items():
        assert figures["displacement"] < TOLERANCE.get(name, 1e-3), name
        assert figures["norm"] < 1e-3, name  # of the last step: what is replicated counts once


def expected(wide, along_gradient):
    """Collectives of an ordinary step: R and, with a residual, the norms of columns; Z (and d); flags; limiters."""
    return {
        "_reduce_scatter_base_": wide * (2 if along_gradient else 1),
        "_allgather_base_": wide,
        "allreduce_": 2 if along_gradient else 1,
    }


@pytest.mark.parametrize("processes", [2, 3])
def test_sharded_and_full_state_dicts_resume_exactly(processes, tmp_path):
    results = launch("resume", processes, tmp_path)
    for name, figures in results.items():
        assert figures == {"sharded": True, "full": True}, name
