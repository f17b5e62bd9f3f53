"""Meshes of more than FSDP2's one dimension on gloo: every placement of a weight gives the run of one process."""

import dataclasses
import re
from pathlib import Path

import pytest
from processes import reported
from streams import COVERING, PLAIN

from hf_lowrank import METHODS
from hf_lowrank.methods import resolve


pytestmark = pytest.mark.processes
KINDS = ("hsdp", "tensor", "both", "turned")
FEW = ["galore_dominant_adamw", "fira_adamw", "flora_adafactor", "full_adafactor", "galore_dominant_muon", "ldadam"]
CUT = [name for name in COVERING if resolve.parts(name, {}).subspace.splits_rows]
"""What runs where both axes of a weight are split."""


def tolerance(name):
    """1e-5 of the displacement, the limit of fp32, but for rules that blow up the rounding of sums over processes.

    Some give the smallest singular vectors equal weight; others iterate in bf16, where rounding tips.
    """
    row = METHODS[name]
    return 2e-2 if row.subspace in ("uniform", "hybrid") or "orthogonalize" in row.defaults else 1e-5


def has_plans():
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return False
    return "ep_size" in {field.name for field in dataclasses.fields(DistributedConfig)}


def launch(check, processes, names, folder, worker="worker_meshes.py"):
    return reported(processes, Path(__file__).parent / worker, folder / f"{check}.json", *names, check=check)


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
        assert figures["norm"] < 1e-5, case  # of the projected gradients, where that is clipped
        assert max(figures["ranks"]) < (1e-3 if tolerance(name) == 1e-5 else 1e-1), case  # of nearly the same updates
        assert figures["refreshes"] == figures["refreshes of one process"], case  # each is made once, copies or not
        assert name not in PLAIN or figures["most on one"] < figures["refreshes"], case


def test_copies_of_one_piece_are_rounded_alike(tmp_path):
    """The draw is keyed by the piece, not by the process: copies in bf16 would drift apart else."""
    assert launch("copies", 2, FEW[:2], tmp_path) == dict.fromkeys(FEW[:2], True)


TORCH = [
    "1d:galore_dominant_adamw",
    "1d:fira_adamw+offload",
    "1d:full_adafactor",
    "fsdp:fira_adamw",
    "fsdp:galore_i3s_adafactor",
]
TRANSFORMERS = [
    "llama:tp_size=2,fsdp_size=2:fira_adamw",
    "llama:dp_replicate_size=2,fsdp_size=2:galore_dominant_adamw",
    "mixtral:fsdp_size=4,ep_size=2:galore_dominant_adamw",
]


@pytest.mark.parametrize(
    "processes, cases", [pytest.param(2, TORCH[:2], id="2"), pytest.param(4, TORCH, id="4", marks=pytest.mark.full)]
)
def test_models_that_torch_has_split_equal_one_process(processes, cases, tmp_path):
    """Column-wise, row-wise, vocabulary, and a norm over split tokens, whose gradient torch leaves as partial sums."""
    for case, figures in launch("torch_plan", processes, cases, tmp_path, worker="worker_plans.py").items():
        assert figures["displacement"] < 1e-5, case
        both = {"S(0)/S(1)", "_S(0, 2)/S(0)"}  # rows and columns; rows twice
        assert {"S(0)", "S(1)", "R"} <= set(figures["placements"]) or both <= set(figures["placements"]), case


@pytest.mark.skipif(not has_plans(), reason="transformers has no DistributedConfig with expert parallel")
@pytest.mark.parametrize(
    "processes, cases",
    [
        pytest.param(2, ["llama:tp_size=2:fira_adamw"], id="2"),
        pytest.param(
            2, ["mixtral:fsdp_size=2,ep_size=2:galore_dominant_adamw"], id="2 experts", marks=pytest.mark.full
        ),
        pytest.param(4, TRANSFORMERS, id="4", marks=pytest.mark.full),
    ],
)
def test_models_that_transformers_has_split_equal_one_process(processes, cases, tmp_path):
    for case, figures in launch("transformers_plan", processes, cases, tmp_path, worker="worker_plans.py").items():
        assert figures["displacement"] < 1e-5, case
        assert figures["placements"] != [""], case


@pytest.mark.full
@pytest.mark.parametrize("name", ["fira_adamw", "galore_i3s_adafactor", "flora_adafactor"])
def test_a_checkpoint_moves_between_meshes(name, tmp_path):
    """HSDP, tensor parallel with FSDP2, FSDP2 of 4 and 3, DDP and one process, as shards and as full state dicts."""
    found = {}
    (tmp_path / "saved").mkdir()
    for processes, kinds in ((3, "fsdp"), (4, "hsdp,both,fsdp,ddp"), (1, "alone"), (3, "fsdp"), (4, "hsdp,both")):
        case = f"{tmp_path / 'saved'}:{name}:{kinds}"
        (pairs,) = launch("moves", processes, [case], tmp_path, worker="worker_moves.py").values()
        found |= pairs
    assert {"hsdp4 to fsdp", "both4 to hsdp", "alone1 to both", "ddp4 to alone", "fsdp3 to hsdp"} <= found.keys()
    for pair, figures in found.items():
        assert figures["exact"], pair  # the state that was loaded has the bits of the state that was saved
        assert figures.get("full", 0.0) == 0.0, pair  # a full state dict is the same checkpoint
        assert figures["displacement"] < 1e-5, pair  # as where it never moved: sums in another order, as above


def test_what_cannot_run_is_refused_when_the_optimizer_is_made(tmp_path):
    found = launch("refused", 2, ["all"], tmp_path, worker="worker_refused.py")["all"]
    for what, words in {
        "haar": r"gwt_adamw adds up neighbours .* split the other axis",
        "full": r"proj_type=full does not run on sharded weights",
        "dense": r"ColumnNorm looks at whole rows.* split its first axis",
        "packed": r"is packed .* split it otherwise",
        "offload": r"lies on the cpu while its mesh is on cuda .* leave out the offload policy",
        "partial": r"is a sum that was not taken",
        "added": r"gwt_adamw adds up neighbours",
    }.items():
        assert re.search(words, found[what]), (what, found[what])
    assert found["experts"] is None  # each process has whole matrices
