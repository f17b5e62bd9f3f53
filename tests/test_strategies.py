"""What the planner says of a run that is spread over processes: sums of pieces, and traffic by its formulas."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_lowrank import estimate_memory
from hf_lowrank.planning.by_name import NAMES, strategy_of
from hf_lowrank.planning.memory import build_optimizer


SIZES = {"hidden_size": 48, "intermediate_size": 120, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(**sizes):
    with torch.device("meta"):
        config = {**SIZES, "num_hidden_layers": 2, "vocab_size": 200, "tie_word_embeddings": False, **sizes}
        return LlamaForCausalLM(LlamaConfig(**config))


def estimate(strategy="", gpus=1, optim="fira_adamw", net=None, **kwargs):
    return estimate_memory(
        net or llama(), optim, rank=8, dtype="bf16", batch=2, seq=16, gpus=gpus, strategy=strategy, **kwargs
    )


def test_one_process_sends_nothing_and_is_what_it_was():
    alone = estimate()
    assert (alone.sent.total, alone.gathered, alone.strategy) == (0, 0, "")
    assert alone == estimate(gpus=1)


def test_replicas_hold_all_and_buckets_of_their_gradients():
    alone, four = estimate(), estimate("ddp", 4)
    assert (four.weights, four.gradients, four.state) == (alone.weights, alone.gradients, alone.state)
    assert four.gathered == alone.gradients
    assert four.sent.gradients == 2 * 3 / 4 * alone.gradients
    assert estimate(gpus=4) == four  # the usual one


@pytest.mark.parametrize("options", [{"reduce_projected": True}, {"layerwise": True}], ids=str)
def test_replicas_that_average_what_they_project_leave_the_rest_to_ddp(options):
    plain, own = (estimate("ddp", 4, optim="galore_dominant_adamw", options=some) for some in ({}, options))
    dense = sum(2 * p.numel() for name, p in llama().named_parameters() if "proj" not in name)
    assert own.gathered == dense and own.sent.gradients == 2 * 3 / 4 * dense
    columns = 2 * (2 * 120 + 120 + 48 * 4)  # the long sides of gate and up, down, q and o, k and v: of two layers
    assert own.sent.step == 2 * 3 / 4 * 4 * 8 * columns
    assert own.sent.refresh > plain.sent.refresh and own.sent.total < plain.sent.total


@pytest.mark.parametrize("gpus", [2, 3, 5])
def test_owners_keep_all_of_the_state_among_them(gpus):
    optimizer = build_optimizer(llama(), "fira_adamw", 8, {})
    whole = list(optimizer.declared())
    most = list(strategy_of("ddp_sharded", gpus, llama(), {}).kept(whole))
    total, share = sum(one.plan.nbytes for one in whole), sum(one.plan.nbytes for one in most)
    largest = max(one.plan.nbytes for one in whole)
    assert total / gpus <= share <= total / gpus + largest  # the largest first: never off by more than one
    assert estimate("ddp_sharded", gpus).state == share
    assert estimate(gpus=gpus, options={"shard_state": True}).strategy == "ddp_sharded"


@pytest.mark.parametrize("optim", ["fira_adamw", "galore_i3s_adamw_8bit", "apollo_random_adamw", "adamw_torch"])
@pytest.mark.parametrize("gpus", [2, 4])
def test_shards_add_up_but_for_what_all_keep(optim, gpus):
    """All sizes can be divided by the number of processes here."""
    sizes = {"intermediate_size": 128}
    alone, shard = (estimate(*a, optim=optim, net=llama(**sizes)) for a in ((), ("fsdp2", gpus)))
    assert shard.weights * gpus == alone.weights and shard.gradients * gpus == alone.gradients
    bases = 0
    if optim != "adamw_torch":
        declared = build_optimizer(llama(**sizes), optim, 8, {}).declared()
        kept = [(one.plan, buffer) for one in declared for buffer in one.plan.kept.values()]
        bases = sum(b.nbytes for _, b in kept if b.slot.lifetime == "basis" or b.axis("n") is None)
    else:
        bases = 4 * len(list(llama(**sizes).parameters()))  # counts of steps
    assert gpus * (shard.state - bases) == alone.state - bases


def test_copies_of_shards_are_shards_that_add_their_gradients_up():
    shards, copies = estimate("fsdp2", 4), estimate("hsdp", 16)
    assert (copies.weights, copies.state) == (estimate("fsdp2", 8).weights, estimate("fsdp2", 8).state)
    assert estimate("hsdp", 4).weights == estimate("fsdp2", 2).weights
    trained = estimate().gradients
    assert copies.sent.gradients == 7 / 8 * trained + 2 * 1 / 2 * trained / 8
    assert shards.sent.gradients == 3 / 4 * trained


def test_layers_are_gathered_twice_and_the_root_once():
    net = llama()
    layers = sum(2 * p.numel() for p in net.model.layers.parameters())
    rest = sum(2 * p.numel() for p in net.parameters()) - layers
    one = estimate("fsdp2", 4)
    assert one.sent.weights == 3 / 4 * (2 * layers + rest)
    assert one.gathered == rest + 3 * layers / 2


def test_wide_matrices_exchange_what_is_projected():
    """Of LLaMA's only down_proj, and keys and values of grouped heads, are wide: their rows are split by FSDP2."""
    one, r = estimate("fsdp2", 4, optim="galore_dominant_adamw"), 8
    columns = 2 * (120 + 48 + 48)  # of both layers' down, k and v
    assert one.sent.step == 2 * 3 / 4 * 4 * r * columns
    along_gradient = estimate("fsdp2", 4, optim="fira_adamw")
    assert along_gradient.sent.step == 2 * 3 / 4 * 4 * (r + 1) * columns


def test_tensor_parallel_follows_the_model_s_plan():
    """Row-wise matrices (o, down) are split along inputs, all others along outputs; what it does not name is whole:
    norms, in older versions of transformers embeddings and head, too."""
    net, gpus = llama(), 2
    one = estimate("tp", gpus)
    named = [
        re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight")) in net._tp_plan for name, _ in net.named_parameters()
    ]
    split, whole = (
        sum(p.numel() for p, at in zip(net.parameters(), named, strict=True) if at is way) for way in (True, False)
    )
    assert one.weights == 2 * (split / gpus + whole)
    assert one.sent.activations == 4 * 2 * (2 * 1 / 2) * (2 * 16 * 48 * 2)
    assert one.activations < estimate().activations
    columns = 2 * (48 + 48 + 48)  # o, k and v of both layers: rows of the wide view; down is split along its columns
    assert one.sent.step == 2 * 1 / 2 * 4 * (8 + 1) * columns


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"strategy": "zero3", "gpus": 2}, "strategy must be one of ddp, ddp_sharded, fsdp2, hsdp, tp"),
        ({"strategy": "fsdp2"}, "needs more than one process"),
        ({"gpus": 0}, "gpus must be at least 1"),
        ({"strategy": "hsdp", "gpus": 7}, "cannot be divided"),
        ({"strategy": "tp", "gpus": 2, "net": torch.nn.Linear(8, 8, device="meta")}, "no plan for tensor parallel"),
    ],
)
def test_what_cannot_be_is_said(kwargs, words):
    with pytest.raises(ValueError, match=words):
        estimate(**kwargs)


@pytest.mark.parametrize("strategy", NAMES)
def test_tables_say_what_is_held_and_sent(strategy):
    one = estimate(strategy, 4)
    assert f"each of 4 GPUs, {strategy}" in one.table()
    assert one.as_dict()["sent"]["gradients"] == one.sent.gradients
    assert one.total >= one.weights + one.gradients + one.gathered + one.state
