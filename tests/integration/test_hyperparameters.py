"""Training arguments reach every group, or are refused; options are checked."""

import pytest
import torch
from conftest import arguments, tiny_data, tiny_llama, train
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, Trainer

import hf_lowrank


def built(tmp_path, model=None, optim="galore_i3s_adamw", **overrides):
    """The optimizer as Trainer creates it, without training."""
    t = Trainer(model or tiny_llama(), arguments(tmp_path, optim, **overrides), train_dataset=tiny_data())
    return t.create_optimizer()


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        ({"learning_rate": 0.037}, "lr", 0.037),
        ({"adam_beta1": 0.7}, "betas", (0.7, 0.999)),
        ({"adam_beta2": 0.8}, "betas", (0.9, 0.8)),
        ({"adam_epsilon": 1e-3}, "eps", 1e-3),
        ({"seed": 11}, "seed", 11),
        ({"optim_args": "rank=4,correct_bias=false"}, "correct_bias", False),
        ({"optim_args": "rank=4,eps_place=released"}, "eps_place", "released"),
    ],
)
def test_every_group_gets_it(overrides, key, value, tmp_path):
    groups = built(tmp_path, **overrides).param_groups
    assert len(groups) == 3 and all(group[key] == value for group in groups)


@pytest.mark.parametrize(
    ("option", "value"),
    [("update_proj_gap", 17), ("scale", 0.5), ("proj_type", "left"), ("stagger", True), ("on_refresh", "rotate")],
)
def test_every_group_of_matrices_gets_the_option(option, value, tmp_path):
    groups = built(tmp_path, optim_args=f"rank=4,{option}={value}").param_groups
    assert [group[option] for group in groups if "rank" in group] == [value]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("learning_rate", 2e-2),
        ("adam_beta1", 0.5),
        ("adam_beta2", 0.9),
        ("adam_epsilon", 1e-2),
        ("weight_decay", 0.5),
        ("lr_scheduler_type", "constant"),
        ("max_grad_norm", 1e-3),
        ("seed", 7),
    ],
)
def test_it_changes_the_trained_weights_of_matrices_and_of_the_rest(name, wrong, tmp_path):
    # fails for an argument that is read and dropped: then both runs are equal
    base = train(arguments(tmp_path / "a", "galore_i3s_adamw", data_seed=3))
    changed = train(arguments(tmp_path / "b", "galore_i3s_adamw", data_seed=3, **{name: wrong}))
    pairs = zip(base.model.named_parameters(), changed.model.parameters(), strict=True)
    same = {key: torch.equal(a, b) for (key, a), b in pairs}
    assert not same["model.layers.0.self_attn.q_proj.weight"]
    if name != "seed":  # the seed draws the subspaces, so it reaches the dense parameters through the gradient only
        assert not same["model.embed_tokens.weight"]


def test_the_schedule_drives_every_group(tmp_path):
    seen = []

    class Watch(hf_lowrank.LowRankCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            seen.append([group["lr"] for group in kwargs["optimizer"].param_groups])

    train(arguments(tmp_path, "galore_i3s_adamw", lr_scheduler_type="linear", max_steps=4), callbacks=[Watch()])
    assert [rates[0] for rates in seen] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert all(rates == [rates[0]] * 3 for rates in seen)


def models():
    bert = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=2
    )
    gpt2 = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return {
        "llama": tiny_llama(),
        "bert": BertForSequenceClassification(bert),
        "gpt2": GPT2LMHeadModel(gpt2),
        "plain": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False)),
    }


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "plain"])
def test_weight_decay_goes_where_trainer_puts_it(name, tmp_path):
    model = models()[name]
    t = Trainer(model, arguments(tmp_path, "galore_i3s_adamw"), train_dataset=tiny_data())
    decaying = {id(p) for n, p in model.named_parameters() if n in t.get_decay_parameter_names(model)}
    optimizer = t.create_optimizer()
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.1 if id(p) in decaying else 0.0)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("rnak=8", "no option 'rnak'; did you mean 'rank'"),
        ("rank=0", "rank must be an integer >= 1"),
        ("rank=2.5", "rank must be an integer >= 1"),
        ("rank=nan", "rank must be"),
        ("rank=many", "rank must be"),
        ("update_proj_gap=0", "update_proj_gap must be an integer >= 1"),
        ("update_proj_gap=1.5", "update_proj_gap must be"),
        ("scale=-1", "scale must be a number > 0"),
        ("scale=inf", "scale must be"),
        ("proj_type=up", "proj_type must be one of std, paper"),
        ("on_refresh=turn", "on_refresh must be one of keep, rotate"),
        ("refresh=power", "refresh must be one of gram, svd"),  # I3S needs the whole spectrum
        ("stagger=perhaps", "stagger must be true, false or auto"),
        ("r0=2", "no option 'r0'"),  # an option of another method
        ("lr=1", "set by the training argument learning_rate"),
        ("rank", "not of the form option=value"),
        ("rank=4,rank=8", "rank is given twice"),
        ("subspace=random", "no option 'subspace'"),
    ],
)
def test_a_bad_option_is_one_clear_error(optim_args, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        built(tmp_path, optim_args=optim_args)


def test_lowrank_takes_its_parts_by_name(tmp_path):
    free = "subspace=i3s,reconstruction=fira,moments=adam,fira_form=paper,rank=4,update_proj_gap=3"
    named = train(arguments(tmp_path / "a", "fira_i3s_adamw", optim_args="fira_form=paper,rank=4,update_proj_gap=3"))
    by_parts = train(arguments(tmp_path / "b", "lowrank", optim_args=free))
    weights = (named.model.parameters(), by_parts.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    with pytest.raises(ValueError, match="subspace must be one of .*dominant, .*hybrid, i3s"):
        built(tmp_path, optim="lowrank", optim_args="subspace=nothing")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fsdp": "full_shard", "fsdp_config": {"version": 1}}, "does not run under FSDP"),
        (
            {"fsdp": "full_shard", "fsdp_config": {"version": 2}, "optim_args": "shard_state=true"},
            "shard_state is for DDP; FSDP2 shards the state by itself",
        ),
        ({"optim_args": "shard_state=maybe"}, "shard_state must be true or false"),
        (
            {"deepspeed": {"train_micro_batch_size_per_gpu": 1}},
            "does not run under DeepSpeed: .* use FSDP2 .* or DDP .*shard_state=true",
        ),
    ],
)
def test_what_would_train_wrongly_is_refused(overrides, message, tmp_path):
    args = arguments(tmp_path, "galore_i3s_adamw")
    for key, value in overrides.items():  # set afterwards: TrainingArguments would look for the packages
        setattr(args, key, value)
    with pytest.raises(ValueError, match=message):
        Trainer.get_optimizer_cls_and_kwargs(args, tiny_llama())


def test_accumulation_of_two_equals_one_batch_of_two(tmp_path):
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = train(arguments(tmp_path / "a", "galore_dominant_adamw"))
    halves = train(arguments(tmp_path / "b", "galore_dominant_adamw", **split))
    start = tiny_llama()
    for a, b, zero in zip(whole.model.parameters(), halves.model.parameters(), start.parameters(), strict=True):
        # the gradients differ by the order of a sum (1e-7); refreshes and Adam amplify that to a few 1e-6
        assert (a - b).norm() <= 1e-4 * (a - zero).norm()
