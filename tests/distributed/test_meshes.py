"""Meshes of more than FSDP2's one dimension on gloo: every placement of a weight gives the run of one process."""

import json
from pathlib import Path

import pytest
from processes import torchrun
from streams import COVERING, PLAIN

from hf_lowrank import METHODS
from hf_lowrank.methods import resolve


pytestmark = pytest.mark.processes
WORKER = Path(__file__).parent / "worker_meshes.py"
KINDS = ("hsdp", "tensor", "both", "turned")
FEW = ["fira_adamw", "flora_adafactor", "full_adafactor", "galore_dominant_muon", "ldadam"]
CUT = [name for name in COVERING if resolve.parts(name, {}).subspace.splits_rows]
"""What runs where both axes of a weight are split."""


def tolerance(name):
    """1e-5 of the displacement, the limit of fp32, but for rules that blow up the rounding of sums over processes.

    Some give the smallest singular vectors equal weight; others iterate in bf16, where rounding tips.
    """
    row = METHODS[name]
    return 2e-2 if row.subspace in ("uniform", "hybrid") or "orthogonalize" in row.defaults else 1e-5


def launch(check, processes, names, folder):
    output = folder / f"{check}-{processes}.json"
    result = torchrun(processes, WORKER, check, output, *names)
    assert output.exists(), result.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    "processes, cases",
    [
        pytest.param(2, [f"{kind}:{name}" for kind in KINDS for name in FEW[:2]], id="2"),
        pytest.param(4, [f"{kind}:{name}" for kind in KINDS for name in FEW], id="4", marks=pytest.mark.full),
        *[
            pytest.param(
                4,
                [f"{kind}:{name}" for name in (COVERING if kind == "hsdp" else CUT)],
                id=kind,
                marks=pytest.mark.full,
            )
            for kind in KINDS
        ],
    ],
)
def test_every_placement_equals_one_process(processes, cases, tmp_path):
    for case, figures in launch("placed", processes, cases, tmp_path).items():
        name = case.partition(":")[2]
        assert figures["displacement"] < tolerance(name), case
        assert figures["same bases"], case
        assert figures["refreshes"] == figures["refreshes of one process"], case  # each is made once, copies or not
        assert name not in PLAIN or figures["most on one"] < figures["refreshes"], case
