"""Replicas that average projected gradients, and the layerwise mode on replicas: as plain DistributedDataParallel."""

from pathlib import Path

import pytest
import torch
from processes import reported
from streams import COVERING

from hf_lowrank import METHODS, LowRankOptimizer
from hf_lowrank.methods import resolve


pytestmark = pytest.mark.processes
WORKER = Path(__file__).parent / "worker_projected.py"
PROJECTED = [name for name in METHODS if not resolve.parts(name, {}).needs_gradient]
FEW = ["galore_dominant_adamw", "galore_i3s_msgd"]  # Adam does not tell a sum from a mean, momentum does
SEVERAL = [
    pytest.param(2, FEW, id="2"),
    pytest.param(4, PROJECTED, id="4 all", marks=pytest.mark.full),
]
CHECKS = ("agrees", "unused", "bad", "clipped", "bf16", "collectives", "memory", "refused")


def tolerance(name):
    """1e-6 of the displacement: P^T mean(G) and mean(P^T G) differ by 1e-7, which Adam divides by sqrt(V).

    Rules that give weight to the smallest singular vectors blow up the rounding of the mean of whole gradients.
    """
    return 1e-5 if METHODS[name].subspace in ("uniform", "hybrid") else 1e-6


def launch(checks, processes, names, folder):
    return reported(processes, WORKER, folder / f"{processes}.json", *names, check=",".join(checks))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every check of one method on two processes, in one launch."""
    return {
        check: figures["galore_dominant_adamw"]
        for check, figures in launch(CHECKS, 2, ["galore_dominant_adamw"], tmp_path_factory.mktemp("2")).items()
    }


@pytest.mark.parametrize("processes, names", SEVERAL)
def test_projected_gradients_train_as_whole_ones_do(processes, names, tmp_path):
    for name, figures in launch(["agrees"], processes, names, tmp_path)["agrees"].items():
        for pieces in (1, 3):
            assert figures[f"displacement {pieces}"] < tolerance(name), name
            assert figures[f"layerwise {pieces}"] < tolerance(name), name
            assert figures[f"same weights {pieces}"] and figures[f"same state {pieces}"], name
            assert figures[f"same layerwise {pieces}"], name
        assert figures["refreshes"], name  # as many as before, shared out
        # over more processes sums depend on the buckets, which DistributedDataParallel forms anew in a resumed run
        assert figures["resumed"] or processes > 2, name


@pytest.mark.parametrize("kind", ["reduced", "layerwise"])
def test_a_gradient_that_one_process_lacks_counts_as_zeros_and_one_that_all_lack_as_none(kind, found):
    figures = found["unused"][kind]
    assert figures["displacement"] < tolerance("galore_dominant_adamw")
    assert figures["same weights"]
    assert figures["steps"] == found["unused"]["plain"]["steps"] == [[6], [6], [0]]


def test_a_gradient_that_is_not_finite_on_one_process_is_skipped_by_all(found):
    assert len(found["bad"]) == 2
    for name, figures in found["bad"].items():
        assert figures == {"kept": True, "skipped": [2]}, name


def test_clipping_is_by_one_norm_on_all_processes(found):
    figures = found["clipped"]
    assert figures["clips"] and figures["same norms"]
    assert figures["displacement"] < tolerance("galore_dominant_adamw")
    assert figures["norms"] < 1e-6  # sums in another order


def test_weights_in_bf16_end_close_and_are_the_same_on_all_processes(found):
    """DistributedDataParallel rounds its mean to bf16, 2^-9 of every element; projected means are in fp32."""
    assert found["bf16"]["same weights"]
    assert found["bf16"]["displacement"] < 5e-2  # and the weights are written in steps of 2^-8 of themselves


def test_a_step_needs_one_collective_and_a_refresh_one_more_per_basis(found):
    assert found["collectives"] == {
        "ordinary": {"allreduce_": 1},
        "refresh": {"allreduce_": 1, "broadcast_": 10},  # whole gradients in the place of projected ones
    }


def test_the_layerwise_mode_holds_one_gradient_and_in_a_refresh_one_for_each_process(found):
    assert found["memory"] == {
        "reduced": {"refresh": 6, "ordinary": 6},
        "layerwise": {"refresh": 2, "ordinary": 1},
    }


@pytest.mark.parametrize(
    "what, message",
    [
        ("not excluded", "exclude_from_ddp(model, optimizer) before"),
        ("not excluded_layerwise", "exclude_from_ddp(model, optimizer) before"),
        ("wrapped", "is wrapped in DistributedDataParallel already"),
        ("another model", "not the one whose weights"),
        ("excluded for nothing", "set reduce_projected=true"),
        ("nothing left", "train a dense one too"),
        ("in the hook", "its step needs whole gradients"),
        ("offload", "its step needs whole gradients"),
        ("sharded", "leave it out"),
    ],
)
def test_what_would_train_wrongly_is_refused_in_a_sentence(what, message, found):
    assert message in found["refused"][what]


@pytest.mark.parametrize("name", [name for name in COVERING if name not in PROJECTED])
def test_a_method_that_needs_the_gradient_refuses_when_it_is_made(name):
    with pytest.raises(ValueError, match="needs the gradient itself"):
        LowRankOptimizer(
            [{"params": [torch.nn.Parameter(torch.ones(4, 6))], "rank": 2, "reduce_projected": True}], name
        )
