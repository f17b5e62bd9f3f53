"""The model card says how the model was trained."""

import json

import pytest
from conftest import arguments, tiny_llama, train
from huggingface_hub import ModelCard
from transformers import Trainer

import hf_lowrank
from hf_lowrank import METHODS, LowRankTrainer, add_to_model_card
from hf_lowrank.hf.model_card import TITLES, section
from hf_lowrank.methods import resolve


@pytest.mark.parametrize("trainer_class", [Trainer, LowRankTrainer])
def test_trainers_card_has_tag_method_options_and_citation_by_itself(trainer_class, tmp_path):
    if trainer_class is LowRankTrainer:  # it needs none of the replaced functions
        args = arguments(tmp_path, "fira_i3s_adamw", max_steps=1)
        hf_lowrank.unregister()
    else:
        args = arguments(tmp_path, "fira_i3s_adamw", max_steps=1)
    trainer = train(args, trainer_class=trainer_class)
    trainer.create_model_card(model_name="tiny", tags="custom")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"custom", "hf-lowrank"} <= set(card.data.tags)
    assert "# tiny" in card.text and "## Training procedure" in card.text  # what Trainer wrote
    assert "`fira_i3s_adamw`" in card.text and "14 matrices" in card.text
    assert "| `rank` | 4 |" in card.text and "| `fira_form` | released |" in card.text
    assert "arxiv.org/abs/2410.01623" in card.text and "eprint = {2502.05790}" in card.text
    trainer.create_model_card(model_name="tiny")  # as push_to_hub does once more
    again = ModelCard.load(tmp_path / "README.md")
    assert again.text.count("## Optimizer") == 1 and "hf-lowrank" in again.data.tags


def test_an_optimizer_that_was_given_by_hand_is_described_as_well(tmp_path):
    args = arguments(tmp_path, "adamw_torch", max_steps=1)
    model = tiny_llama()
    pair = hf_lowrank.optimizer_cls_and_kwargs(model, "galore_i3s_adamw", args=args, rank=4)
    trainer = train(args, model, optimizer_cls_and_kwargs=pair)
    trainer.create_model_card(model_name="tiny")
    assert "Trained with `galore_i3s_adamw`" in (tmp_path / "README.md").read_text()


def test_a_later_run_of_another_optimizer_in_the_same_folder_is_not_described(tmp_path):
    train(arguments(tmp_path, "galore_i3s_adamw", max_steps=1))
    trainer = train(arguments(tmp_path, "adamw_torch", max_steps=1))
    trainer.create_model_card(model_name="tiny")
    card = ModelCard.load(tmp_path / "README.md")
    assert "## Optimizer" not in card.text and "hf-lowrank" not in (card.data.tags or [])


def test_twice_is_the_same_as_once_and_a_folder_without_a_card_gets_one(tmp_path):
    train(arguments(tmp_path, "galore_i3s_adamw", max_steps=1))
    once = add_to_model_card(tmp_path).read_text()
    assert add_to_model_card(tmp_path).read_text() == once
    assert once.count("## Optimizer") == 1


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"optimizer": "no_such"}', '{"optimizer": "fira_adamw"}'])
def test_a_folder_without_a_readable_run_of_ours_is_refused(text, tmp_path):
    if text is not None:
        (tmp_path / "hf_lowrank.json").write_text(text)
    with pytest.raises(ValueError, match=r"has no readable hf_lowrank.json"):
        add_to_model_card(tmp_path)


def test_groups_that_differ_show_all_their_values():
    groups = [{"method": "fira_adamw", "rank": rank, "scale": 0.25, "param_names": ["w"]} for rank in (4, 8)]
    text = section({"optimizer": "fira_adamw", "groups": groups})
    assert "Options of the 2 matrices" in text and "| `rank` | 4, 8 |" in text and "| `scale` | 0.25 |" in text


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_cited_by_the_title_of_its_papers(name):
    chosen = {"subspace": "grassmann", "reconstruction": "fira", "moments": "came"} if METHODS[name].free else {}
    groups = [{"method": name, "param_names": ["w"], **resolve.complete(name, chosen)}]
    text = section(json.loads(json.dumps({"optimizer": name, "groups": groups})))
    assert text.count("@misc{") == text.count("arxiv.org/abs") / 2 >= 1
    assert "title = {arXiv" not in text
    own = {"adafactor": "1804.04235", "adam_mini": "2406.16793", "came": "2307.02047"}
    if (moments := chosen.get("moments", METHODS[name].moments)) in own:
        assert TITLES[own[moments]] in text
    if chosen:
        assert TITLES["2502.01586"] in text and TITLES["2410.01623"] in text
