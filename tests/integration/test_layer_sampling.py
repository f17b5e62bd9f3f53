"""Layer sampling through Trainer: who trains when, what is kept of them, and exact resume, with any optimizer."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import arguments, engine, options_for, tiny_data, tiny_llama, train
from processes import on_processes
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback

from hf_lowrank import LayerSampling, LowRankOptimizer, LowRankTrainer, estimate_memory
from hf_lowrank.hf.outliers import outlier_shares
from hf_lowrank.layer_sampling import RULES, Layers, OwLore, rule_of
from hf_lowrank.observe.records import RUN_FILE
from hf_lowrank.state import view


WORKER = Path(__file__).parent / "layers_worker.py"
DEPTH, EVERY, STEPS = 4, 3, 12
OURS = "galore_i3s_adamw"
SAMPLING = {
    "badam": f"layer_sampling=badam,switch_every={EVERY}",
    "lisa": f"layer_sampling=lisa,switch_every={EVERY},sampled_layers=2",
    "owlore": f"layer_sampling=owlore,switch_every={EVERY},sampled_layers=2,outlier_threshold=2,calibration_batches=2",
}


def deep(dtype=torch.float32, **overrides):
    return tiny_llama(dtype, num_hidden_layers=DEPTH, **overrides)


def sampled(folder, optim, rule, **overrides):
    text = ",".join(filter(None, [options_for(optim), SAMPLING[rule]]))
    return arguments(folder, optim, **{"optim_args": text, "max_steps": STEPS, **overrides})


class Seen(TrainerCallback):
    """Notes at every step which weights have gradients, which have state, and which have moved."""

    def __init__(self):
        self.gradients, self.states, self.moved, self.before = [], [], [], None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.gradients.append({name for name, p in model.named_parameters() if p.grad is not None})
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        held = {
            id(p)
            for p, s in optimizer.state.items()
            if any(torch.as_tensor(x).dim() for k, x in s.items() if k != "report")
        }
        self.states.append({name for name, p in model.named_parameters() if id(p) in held})
        self.moved.append({n for n, p in model.named_parameters() if not torch.equal(p, self.before[n])})


def depths(names):
    return {int(name.split(".")[2]) for name in names if ".layers." in name}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", OURS, "fira_adamw", "full_adamw_layerwise"])
@pytest.mark.parametrize("rule", ["badam", "lisa"])
def test_only_what_is_chosen_has_gradients_state_and_steps(rule, optim, tmp_path):
    """With weight decay, which moves every weight that is stepped; a scheduled rate of zero ends the run."""
    seen, overrides = Seen(), {"max_grad_norm": 0.0} if "layerwise" in optim else {}
    trainer = train(sampled(tmp_path, optim, rule, **overrides), deep(), callbacks=[seen])
    everything = {name for name, _ in trainer.model.named_parameters()}
    outside = {name for name in everything if ".layers." not in name}
    expected = rule_of(rule, {"switch_every": EVERY, "sampled_layers": 1 if rule == "badam" else 2})
    for step, (gradients, held, moved) in enumerate(zip(seen.gradients, seen.states, seen.moved, strict=True)):
        now = set(expected.choose(DEPTH, step // EVERY, trainer.args.seed, ()))
        active = {name for name in everything if depths([name]) & now} | (outside if rule == "lisa" else set())
        assert held == active
        if "layerwise" not in optim:
            assert gradients == active and moved == active
    if rule == "badam":
        assert sorted(layer for moved in seen.states for layer in depths(moved)) == sorted([*range(DEPTH)] * EVERY)
    assert all(p.requires_grad for p in trainer.model.parameters())  # as before


def same(a, b):
    weights = zip(a.model.parameters(), b.model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in weights)
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        s, t = (engine(trainer).state.get(w, {}) for trainer, w in ((a, p), (b, q)))
        assert s.keys() == t.keys() and all(torch.equal(torch.as_tensor(s[k]), torch.as_tensor(t[k])) for k in s)


@pytest.mark.parametrize("optim", ["adamw_torch", OURS])
@pytest.mark.parametrize("rule", RULES)
def test_resumed_inside_an_interval_and_at_a_switch_it_is_the_same_run(rule, optim, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 8}
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = train(sampled(tmp_path / "whole", optim, rule, **saving, **split), deep())
    for step in (4, 6):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole", folder)
        args = sampled(folder, optim, rule, max_steps=8, **split)
        same(train(args, deep(), resume=str(folder / f"checkpoint-{step}")), whole)


@pytest.mark.parametrize(
    "rule, change, said",
    [
        ("badam", "layer_order=descending", "layer_order=descending was given, the checkpoint has random"),
        ("lisa", "switch_every=2", "switch_every=2 was given, the checkpoint has 3"),
        ("owlore", "outlier_threshold=3", "outlier_threshold=3.0 was given, the checkpoint has 2.0"),
        ("owlore", "layer_sampling=lisa", "layer_sampling=lisa was given, the checkpoint has owlore"),
        ("lisa", "seed", "seed=9 was given, the checkpoint has 42"),
    ],
    ids=["order", "interval", "threshold", "rule", "seed"],
)
@pytest.mark.parametrize("optim", ["adamw_torch", OURS])
def test_of_options_that_are_changed_at_a_resume_the_checkpoints_count(optim, rule, change, said, tmp_path):
    whole = train(sampled(tmp_path, optim, rule, save_strategy="steps", save_steps=4, max_steps=8), deep())
    given = dict(pair.split("=") for pair in sampled(tmp_path, optim, rule).optim_args.split(","))
    more = {"seed": 9, "data_seed": 42} if change == "seed" else {}
    key, _, value = change.partition("=")
    if change == "layer_sampling=lisa":
        given = {key: value for key, value in given.items() if key not in ("outlier_threshold", "calibration_batches")}
    given |= {key: value} if value else {}
    text = ",".join(f"{key}={value}" for key, value in given.items())
    args = sampled(tmp_path / "rest", optim, rule, optim_args=text, max_steps=8, **more)
    with pytest.warns(UserWarning, match=said):
        resumed = train(args, deep(), resume=str(tmp_path / "checkpoint-4"))
    same(resumed, whole)


@pytest.mark.parametrize("trainer_class", [Trainer, LowRankTrainer])
@pytest.mark.parametrize("optim", ["adamw_torch", OURS])
def test_layers_are_sampled_from_the_first_step_to_the_last_or_never(optim, trainer_class, tmp_path):
    """A forgotten option would train all layers, with gradients and state of all."""
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    train(sampled(tmp_path / "some", optim, "lisa", **saving), deep(), trainer_class=trainer_class)
    train(arguments(tmp_path / "all", optim, **saving), deep(), trainer_class=trainer_class)
    some, everything = (str(tmp_path / name / "checkpoint-4") for name in ("some", "all"))
    with pytest.raises(ValueError, match="a run with layer_sampling=lisa, and this one trains all layers: give it"):
        train(arguments(tmp_path / "rest", optim, max_steps=8), deep(), resume=some, trainer_class=trainer_class)
    with pytest.raises(ValueError, match="a run that trained all layers, and this run has layer_sampling=lisa: leave"):
        args = sampled(tmp_path / "rest", optim, "lisa", max_steps=8)
        train(args, deep(), resume=everything, trainer_class=trainer_class)


@pytest.mark.parametrize("optim", ["adamw_torch", OURS])
def test_all_layers_at_once_are_plain_training(optim, tmp_path):
    plain = train(arguments(tmp_path / "a", optim, max_steps=7), deep())
    lisa = LayerSampling("lisa", sampled_layers=DEPTH, switch_every=2)
    same(train(arguments(tmp_path / "b", optim, max_steps=7), deep(), callbacks=[lisa]), plain)
    badam = LayerSampling("badam", sampled_layers=DEPTH, switch_every=7, train_outside=True)
    same(train(arguments(tmp_path / "c", optim, max_steps=7), deep(), callbacks=[badam]), plain)


@pytest.mark.parametrize("optim", ["adamw_torch", OURS])
@pytest.mark.parametrize("rule, steps", [("badam", 2), ("lisa", 8)])
def test_badam_begins_every_interval_without_moments_and_lisa_goes_on(rule, steps, optim, tmp_path):
    """All layers at all times, so that none leaves; the last switch of 8 steps is before the seventh."""
    sampling = LayerSampling(rule, sampled_layers=DEPTH, switch_every=EVERY, train_outside=True)
    trainer = train(arguments(tmp_path, optim, max_steps=8), deep(), callbacks=[sampling])
    count = "step" if optim == "adamw_torch" else "moment_step"
    states = {name: engine(trainer).state[p][count] for name, p in trainer.model.named_parameters()}
    assert all(int(count) == (steps if ".layers." in name else 8) for name, count in states.items())


def test_optim_args_and_a_callback_are_the_same(tmp_path):
    by_args = train(sampled(tmp_path / "a", OURS, "lisa"), deep())
    callback = LayerSampling("lisa", switch_every=EVERY, sampled_layers=2)
    same(train(arguments(tmp_path / "b", OURS, max_steps=STEPS), deep(), callbacks=[callback]), by_args)
    same(train(sampled(tmp_path / "c", OURS, "lisa"), deep(), trainer_class=LowRankTrainer), by_args)


def test_a_second_training_goes_on_with_all_parameters(tmp_path):
    args = sampled(tmp_path, "adamw_torch", "badam", max_steps=2)
    trainer = train(args, deep())
    trainer.train()
    assert not any(isinstance(c, LayerSampling) for c in trainer.callback_handler.callbacks)  # it is a training's own


def test_an_interrupted_training_leaves_nothing_frozen(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    model = deep()
    with pytest.raises(KeyboardInterrupt):
        train(sampled(tmp_path, OURS, "badam"), model, callbacks=[Stop()])
    assert all(p.requires_grad for p in model.parameters())


# ---- the head, the inputs, the memory -------------------------------------------------------------------------------


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=DEPTH, max_position_embeddings=32, **sizes))


def test_a_new_head_trains_always_and_keeps_its_state(tmp_path):
    data = [{"input_ids": row["input_ids"], "labels": int(row["input_ids"][0]) % 2} for row in tiny_data()]
    trainer = Trainer(classifier(), sampled(tmp_path, "adamw_torch", "badam"), train_dataset=data, callbacks=[Seen()])
    trainer.train()
    seen = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Seen))
    others = {name for moved in seen.moved for name in moved if ".layer." not in name}
    assert others == {"classifier.weight", "classifier.bias"}
    assert all(others <= moved for moved in seen.moved)
    assert engine(trainer).state[trainer.model.classifier.weight]["step"] == STEPS  # those of a layer start over
    assert {int(s["step"]) for p, s in engine(trainer).state.items() if p.dim() == 1 and len(p) == 24} == {EVERY}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_of_activations_change_nothing(reentrant, tmp_path):
    """With frozen embeddings, behind which reentrant checkpoints pass no gradients on by themselves."""
    plain = train(sampled(tmp_path / "a", "adamw_torch", "badam"), deep())
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    recomputed = train(sampled(tmp_path / "b", "adamw_torch", "badam", **kwargs), deep())
    for p, q, start in zip(plain.model.parameters(), recomputed.model.parameters(), deep().parameters(), strict=True):
        # the same numbers, recomputed: nothing but the order of sums may differ, amplified by Adam
        assert (p - q).norm() <= 1e-4 * (p - start).norm()


def saved_bytes(model):
    """What a forward pass keeps for the backward pass, weights aside."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = x, storage.nbytes()
        return x

    batch = torch.stack([row["input_ids"] for row in tiny_data(4)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(input_ids=batch, labels=batch)
    return sum(size for _, size in kept.values())


def test_activations_below_the_first_layer_that_trains_are_not_kept():
    """Each frozen layer at the bottom keeps nothing; one above keeps what its gradient by the input needs, and less
    than where its weights train."""
    model = deep()
    everything = saved_bytes(model)
    sampling = Layers(model, model.parameters(), rule_of("badam", {}))
    kept = []
    for layer in range(DEPTH):
        sampling.require_([layer])
        kept.append(saved_bytes(model))
    assert all(lower > higher for lower, higher in pairwise([everything, *kept]))
    steps = [a - b for a, b in pairwise(kept)]
    assert max(steps) == min(steps)  # one layer's each


@pytest.mark.parametrize("rule", ["badam", "lisa"])
def test_the_log_and_the_folder_of_a_run_know_what_is_held(rule, tmp_path):
    trainer = train(sampled(tmp_path, OURS, rule), deep())
    optimizer = engine(trainer)
    rows = [row for row in trainer.state.log_history if "lowrank/state_mib" in row]
    assert max(row["lowrank/state_mib"] for row in rows) * 2**20 < 0.75 * sum(
        plan.nbytes for *_, plan in optimizer.declared()
    )
    counts = [row["lowrank/refreshes"] for row in rows]
    assert counts == sorted(counts)  # what has been refreshed and forgotten stays counted
    memory = json.loads((tmp_path / RUN_FILE).read_text())["memory"]
    first = sum(p.nbytes for p in trainer.model.parameters() if p.dim()) - memory["gradients"]
    assert first > 0
    assert sum(map(view.nbytes, optimizer.state.values())) <= memory["low_rank_state"] + memory["dense_state"] + 8


@pytest.mark.parametrize("optim", ["adamw_torch", OURS])
@pytest.mark.parametrize("rule", ["badam", "lisa"])
def test_the_plan_is_what_the_run_holds_at_most(rule, optim, tmp_path):
    class Held(TrainerCallback):
        gradients = state = 0

        def on_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
            self.gradients = max(self.gradients, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))
            self.state = max(self.state, sum(map(view.nbytes, optimizer.state.values())))

    held, args, model = Held(), sampled(tmp_path, optim, rule), deep()
    options = dict(item.split("=") for item in args.optim_args.split(","))
    planned = estimate_memory(model, optim, dtype="fp32", options=options)
    assert all(p.requires_grad for p in model.parameters())
    train(args, model, callbacks=[held])
    assert (planned.gradients, planned.state) == (held.gradients, held.state)
    everything = estimate_memory(model, optim, dtype="fp32", options={"rank": 4} if optim == OURS else {})
    assert planned.state < everything.state and planned.gradients < everything.gradients


# ---- outliers -------------------------------------------------------------------------------------------------------


def shares_of(model, threshold=2.0):
    sampling = Layers(model, model.parameters(), OwLore(sampled_layers=1, outlier_threshold=threshold))
    batch = torch.stack([row["input_ids"] for row in tiny_data(8)])
    return outlier_shares(sampling, model, [{"input_ids": batch[:4]}, {"input_ids": batch[4:]}])


def test_shares_of_outliers_by_their_definition():
    """Against the definition written out with the whole inputs, in float64."""
    model, inputs = deep(), {}
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}
    handles = [m.register_forward_pre_hook(lambda m, x, n=n: inputs.update({n: x[0]})) for n, m in linear.items()]
    model.eval()(input_ids=torch.stack([row["input_ids"] for row in tiny_data(8)]))
    for handle in handles:
        handle.remove()
    for layer, share in enumerate(shares_of(model.train())):
        A = [
            (m.weight.double().abs() * inputs[n].double().flatten(0, 1).norm(dim=0)).flatten()
            for n, m in linear.items()
            if f"layers.{layer}." in n
        ]
        entries = torch.cat(A)
        # an entry within rounding of the threshold may be counted on either side
        assert abs(share - float((entries > 2 * entries.mean()).double().mean())) <= 1.5 / len(entries)
    assert model.training


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(tiny_data())


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss * inputs["weight"].mean()


def test_outliers_are_looked_for_in_a_stream_and_in_batches_that_hold_more_than_the_model_takes(tmp_path):
    rule = "layer_sampling=owlore,sampled_layers=1,switch_every=2,outlier_threshold=2"
    args = arguments(tmp_path, "galore_i3s_adamw", optim_args=f"rank=4,{rule}", remove_unused_columns=False)
    Trainer(deep(), args, train_dataset=Streamed()).train()
    data = [{**row, "weight": torch.ones(1)} for row in tiny_data()]
    model = deep()
    original = model.forward  # of a model that takes nothing beside what it names
    model.forward = lambda input_ids=None, labels=None: original(input_ids=input_ids, labels=labels)
    OwnLoss(model, args, train_dataset=data).train()
    with pytest.raises(ValueError, match="OwLore looks at the inputs.*of type list: use layer_sampling=lisa"):
        Trainer(deep(), args, train_dataset=tiny_data(), data_collator=list).train()


class Apart(torch.nn.Module):
    """Linear layers that all have the same input."""

    def __init__(self, *weights):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 5, bias=False) for _ in weights])
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.weight.data.copy_(weight)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def test_shares_do_not_depend_on_the_size_of_weights_and_are_none_among_equals():
    gen = torch.Generator().manual_seed(0)
    W, X = torch.randn(5, 6, generator=gen), torch.randn(9, 6, generator=gen)
    model = Apart(W, 4 * W, torch.ones(5, 6))
    sampling = Layers(model, model.parameters(), OwLore(sampled_layers=1, outlier_threshold=1.5))
    once, again, _ = outlier_shares(sampling, model, [{"x": X}])
    assert once == again > 0
    assert outlier_shares(sampling, model, [{"x": torch.ones(9, 6)}])[2] == 0  # |W| = |X| = 1


def test_owlore_without_outliers_is_refused(tmp_path):
    text = "layer_sampling=owlore,sampled_layers=2,outlier_threshold=1000"
    with pytest.raises(ValueError, match="0 of 4 layers have outliers.*choose a smaller outlier_threshold"):
        train(arguments(tmp_path, "adamw_torch", optim_args=text), deep())


def test_measuring_outliers_moves_no_generator(tmp_path):
    """The data come in the order of a run that measures nothing."""
    every = {"sampled_layers": DEPTH, "switch_every": 100}
    owlore = LayerSampling("owlore", outlier_threshold=2.0, **every)
    same(
        train(arguments(tmp_path / "a", "adamw_torch"), deep(), callbacks=[owlore]),
        train(arguments(tmp_path / "b", "adamw_torch"), deep()),
    )


def test_a_run_that_ends_before_all_layers_were_trained_says_so(tmp_path, caplog):
    for switch_every, said in ((1, False), (3, True)):
        text = f"layer_sampling=badam,switch_every={switch_every}"
        caplog.clear()
        with caplog.at_level("WARNING", "hf_lowrank"):
            train(arguments(tmp_path / str(switch_every), "adamw_torch", optim_args=text, max_steps=6), deep())
        assert ("in 6 steps at most 2 of 4 layers train" in caplog.text) is said


# ---- refused --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_said_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="sampled_layers=9: LlamaForCausalLM has 4 layers that train"):
        train(arguments(tmp_path, OURS, optim_args="rank=4,layer_sampling=lisa,sampled_layers=9"), deep())
    with pytest.raises(ValueError, match="layer_sampling=badam: option switch_every must be an integer >= 1"):
        train(arguments(tmp_path, OURS, optim_args="rank=4,layer_sampling=badam,switch_every=0"), deep())
    with pytest.raises(ValueError, match="switch_every: for layer sampling only; add layer_sampling="):
        train(arguments(tmp_path, OURS, optim_args="rank=4,switch_every=5"), deep())
    for text in ("layer_sampling=badam,switch_evry=5", "layer_samplng=badam"):  # beside any optimizer
        for optim in (OURS, "adamw_torch"):
            with pytest.raises(ValueError, match="there is no option '(switch_evry|layer_samplng)'; did you mean '"):
                train(arguments(tmp_path, optim, optim_args=text), deep())
    with pytest.raises(ValueError, match="given twice"):
        train(sampled(tmp_path, OURS, "lisa"), deep(), callbacks=[LayerSampling("badam")])


def test_a_model_that_is_sharded_is_refused(tmp_path):
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    class Sharded(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP

    try:
        with pytest.raises(ValueError, match="layer_sampling does not run under FSDP or DeepSpeed"):
            train(arguments(tmp_path, OURS), deep(), callbacks=[Sharded(), LayerSampling("badam")])
    finally:
        AcceleratorState._shared_state["distributed_type"] = DistributedType.NO


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize(
    "optim, options",
    [
        ("adamw_torch", "layer_sampling=badam,switch_every=2"),
        (OURS, "rank=4,update_proj_gap=3,stagger=false,layer_sampling=lisa,switch_every=2,sampled_layers=1"),
    ],
)
def test_two_processes_equal_one_and_reduce_only_what_trains(optim, options, tmp_path):
    result = on_processes(2, WORKER, optim, options, tmp_path)
    assert (tmp_path / "report.json").exists(), result.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["alike"] and report["resumed exactly"]
    assert all(gradients == buffers for gradients, buffers in report["reduced"])
    assert all(now > before for before, now in pairwise([0, *report["hooked"]]))  # a hook of DDP's outlives a switch
    args = arguments(tmp_path / "alone", optim, optim_args=options, max_steps=6, max_grad_norm=0.0)
    start, alone = tiny_llama(num_hidden_layers=3), train(args, tiny_llama(num_hidden_layers=3))
    assert isinstance(engine(alone), LowRankOptimizer) == (optim == OURS)
    for a, b, zero in zip(
        torch.load(tmp_path / "weights.pt"), alone.model.parameters(), start.parameters(), strict=True
    ):
        # sums of gradients in another order, amplified by Adam
        assert (a - b).norm() <= 1e-3 * (b - zero).norm() + 1e-7
