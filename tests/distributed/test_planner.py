"""What the planner says that each process holds and sends, against what it holds and sends on gloo."""

from pathlib import Path

import pytest
from processes import reported

from distributed.worker_planner import GAP, llama
from hf_lowrank import estimate_memory


pytestmark = pytest.mark.processes
WORKER = Path(__file__).parent / "worker_planner.py"
NAMES = ["galore_dominant_adamw", "fira_adamw"]


FOUR = ["hsdp", "ddp_sharded", "fsdp2"]


@pytest.mark.parametrize(
    "processes, strategies",
    [
        pytest.param(2, ["ddp", "ddp_sharded", "fsdp2", "fsdp2 shard_basis", "tp"], id="2"),
        pytest.param(4, FOUR, id="4", marks=pytest.mark.full),
    ],
)
def test_bytes_of_each_process(processes, strategies, tmp_path):
    for name, found in reported(processes, WORKER, tmp_path / "bytes.json", ",".join(strategies), *NAMES).items():
        for strategy, one in found.items():
            kind, *options = strategy.split()
            said = estimate_memory(
                llama(), name, rank=8, dtype="fp32", batch=2, seq=32, gpus=processes, strategy=kind,
                options={"update_proj_gap": GAP, **dict.fromkeys(options, True)},
            )  # fmt: skip
            assert (one["state"], one["weights"]) == (said.state, said.weights), (name, strategy)
            # flags of finiteness, reports of refreshes and sums of limiters are some numbers a matrix: not counted
            few = 24 * 4 * len(list(llama().parameters()))
            if kind == "tp":  # its collectives are those of the model; they are not looked at here
                continue
            passes = said.sent.weights + said.sent.activations + said.sent.gradients
            for what, sent in {"passes": passes, "step": said.sent.step, "refresh": said.sent.refresh}.items():
                less = 0.1 * sent if (kind, what) == ("hsdp", "refresh") else 1  # copies gather different matrices
                assert sent - less <= one[what] <= sent + less + few, (name, strategy, what)
