"""Pieces of bases under FSDP2: what is kept changes, what is computed does not."""

from pathlib import Path

import pytest
from processes import reported
from streams import COVERING, PLAIN

from hf_lowrank import METHODS


pytestmark = pytest.mark.processes
WORKER = Path(__file__).parent / "worker_bases.py"


@pytest.mark.parametrize(
    "processes, names",
    [
        pytest.param(2, [*PLAIN[:2], "fira_adamw"], id="2"),
        pytest.param(3, COVERING, id="3", marks=pytest.mark.full),
        pytest.param(4, list(METHODS), id="4 all", marks=pytest.mark.full),
    ],
)
def test_runs_are_bit_for_bit_those_with_whole_bases_and_resume(processes, names, tmp_path):
    for name, found in reported(processes, WORKER, tmp_path / "bases.json", *names, check="pieces").items():
        assert found["weights"] and found["state"] and found["sharded"] and found["full"], name
        assert found["layerwise"] < 1e-5, name  # norms are summed in another order there, which iterations feel
        assert found["bytes"] == found["declared"], name
        assert name not in PLAIN or found["bytes"][1] < found["bytes"][0], name
