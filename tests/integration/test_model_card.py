"""The model card says how the model was trained."""

import pytest
from conftest import arguments, train
from huggingface_hub import ModelCard

from hf_lowrank.model_card import add_to_model_card


def test_the_card_has_tag_method_options_and_citation_beside_what_trainer_wrote(tmp_path):
    trainer = train(arguments(tmp_path, "fira_i3s_adamw", max_steps=1))
    assert "hf-lowrank" in trainer.model.model_tags  # what push_to_hub adds by itself
    trainer.create_model_card(model_name="tiny", tags="custom")
    before = (tmp_path / "README.md").read_text()
    add_to_model_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert {"custom", "hf-lowrank"} <= set(card.data.tags)
    assert before.split("---")[-1].strip() in card.content  # nothing of it is lost
    assert (
        "`fira_i3s_adamw`" in card.text and "| `rank` | 4 |" in card.text and "| `fira_form` | released |" in card.text
    )
    assert "arxiv.org/abs/2410.01623" in card.text and "eprint = {2502.05790}" in card.text
    assert "14 matrices" in card.text


def test_twice_is_the_same_as_once_and_a_folder_without_a_card_gets_one(tmp_path):
    train(arguments(tmp_path, "galore_i3s_adamw", max_steps=1))
    once = add_to_model_card(tmp_path).read_text()
    assert add_to_model_card(tmp_path).read_text() == once
    assert once.count("## Optimizer") == 1


def test_a_folder_of_another_optimizer_is_refused(tmp_path):
    train(arguments(tmp_path, "adamw_torch", max_steps=1))
    with pytest.raises(ValueError, match=r"has no readable hf_lowrank.json"):
        add_to_model_card(tmp_path)
