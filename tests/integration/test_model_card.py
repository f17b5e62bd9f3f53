"""The model card says how the model was trained."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import arguments, tiny_llama, train
from huggingface_hub import ModelCard
from transformers import Trainer

import hf_lowrank
from hf_lowrank import METHODS, LowRankTrainer, Method, Subspace, add_to_model_card
from hf_lowrank.hf.model_card import section
from hf_lowrank.methods import papers, resolve, tables
from hf_lowrank.methods.registry import KINDS, classes
from hf_lowrank.observe.records import RUN_FILE


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


def test_the_card_names_the_version_that_trained(tmp_path):
    train(arguments(tmp_path, "galore_i3s_adamw", max_steps=1)).create_model_card(model_name="tiny")
    card, run = tmp_path / "README.md", tmp_path / RUN_FILE
    assert f"of `hf_lowrank` {hf_lowrank.__version__}:" in card.read_text()
    run.write_text(json.dumps({**json.loads(run.read_text()), "version": "0.0.7"}))
    add_to_model_card(tmp_path)
    assert "of `hf_lowrank` 0.0.7:" in card.read_text()


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


CITED = {
    "galore_dominant_adamw": ["2403.03507", "1412.6980"],
    "fira_i3s_came": ["2502.05790", "2410.01623", "2307.02047"],
    "galore_i3s_adafactor": ["2502.05790", "1804.04235"],
    "galore_dominant_adam_mini": ["2403.03507", "2406.16793"],
    "flora_adafactor": ["2402.03293"],  # its sketch is APOLLO's too, which is not what was used
    "subtrack_pp_adamw": ["2502.01586", "1412.6980", "2410.01623"],
    "ldadam": ["2410.16103", "1412.6980"],
}


@pytest.mark.parametrize("name", CITED)
def test_what_is_cited_follows_from_the_row_and_its_parts(name):
    text = section({"optimizer": name, "groups": [{"method": name, **resolve.complete(name, {})}]})
    assert re.findall(r"eprint = \{(.*?)\}", text) == CITED[name]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_cited_by_the_title_of_its_papers(name):
    chosen = {"subspace": "grassmann", "reconstruction": "fira", "moments": "came"} if METHODS[name].free else {}
    groups = [{"method": name, "param_names": ["w"], **resolve.complete(name, chosen)}]
    text = section(json.loads(json.dumps({"optimizer": name, "groups": groups})))
    assert text.count("@misc{") == text.count("arxiv.org/abs") / 2 >= 1
    assert "title = {arXiv" not in text
    assert all(papers.TITLES[number] in text for number in papers.numbers(METHODS[name].paper))
    if chosen:
        assert re.findall(r"eprint = \{(.*?)\}", text) == ["2502.01586", "2307.02047", "2410.01623"]


def test_the_card_links_to_papers_alone():
    """There is no package page yet."""
    groups = [{"method": "fira_adamw", **resolve.complete("fira_adamw", {})}]
    links = re.findall(r"https?://[^\s)}]+", section({"optimizer": "fira_adamw", "groups": groups}))
    assert links and all(link.startswith("https://arxiv.org/abs/") for link in links)


@dataclass(frozen=True)
class Mine(Subspace):
    """The dominant subspace, by another name."""

    def choose(self, s, G, ctx):
        U, sigma, _ = torch.linalg.svd(G.float(), full_matrices=False)
        return U[..., : s["basis"].shape[-1]], sigma


@dataclass(frozen=True)
class Published(Mine):
    """The same, published.

    References:
        A paper of one's own, arXiv
        2601.00001, section 2.
    """


@pytest.fixture
def mine(monkeypatch):
    """A method of one's own without a paper, and one with a paper that is in no table."""
    monkeypatch.setitem(METHODS, "mine", Method(Mine(), "momentum", "project", "a method of mine", "-"))
    monkeypatch.setitem(METHODS, "published", Method(Published(), "adam", "project", "a method of mine", "ours"))


@pytest.mark.parametrize(("name", "number"), [("mine", None), ("published", "2601.00001")])
def test_a_method_of_ones_own_needs_no_paper(name, number, mine, tmp_path):
    args, model = arguments(tmp_path, "adamw_torch", max_steps=1), tiny_llama()
    pair = hf_lowrank.optimizer_cls_and_kwargs(model, name, args=args, rank=4)
    trainer = train(args, model, optimizer_cls_and_kwargs=pair)
    trainer.create_model_card(model_name="tiny")
    text = ModelCard.load(tmp_path / "README.md").text
    assert f"Trained with `{name}`" in text and "a method of mine." in text
    cited = re.findall(r"eprint = \{(.*?)\}", text)
    made = resolve.parts(name, {})
    assert cited == papers.of(METHODS[name].paper, made.subspace, made.moments, made.reconstruction)
    assert (number in cited and f"title = {{arXiv:{number}}}" in text) if number else "title = {arXiv" not in text
    row = next(line for line in tables.table().splitlines() if f"`{name}`" in line)
    assert "a method of mine" in row


def test_a_row_and_parts_without_any_paper_cite_nothing(mine):
    assert papers.of("-", Mine(), Mine(), Mine()) == papers.of("", Mine(), Mine(), Mine()) == []
    text = section({"optimizer": "mine", "groups": [{"method": "mine", **resolve.complete("mine", {})}]})
    assert re.findall(r"eprint = \{(.*?)\}", text) == ["2502.05790"]  # that of the momentum: the row has none


def test_a_docs_page_of_a_method_without_a_paper(mine):
    spec = importlib.util.spec_from_file_location("hooks", Path(__file__).parents[2] / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = hooks.page("mine")
    assert text.startswith("# mine\n\nA method of mine. State per")


def test_papers_are_read_from_texts_and_linked():
    text = "GaLore, arXiv 2403.03507, Algorithm 2; Fira, arXiv\n    2410.01623; again arXiv 2403.03507"
    assert papers.numbers(text) == ["2403.03507", "2410.01623"] and papers.numbers(None) == []
    assert papers.linked("arXiv 2403.03507, s. 2") == "[arXiv 2403.03507](https://arxiv.org/abs/2403.03507), s. 2"


def test_every_paper_that_rows_parts_and_readme_name_has_its_title():
    parts = [part for kind in KINDS for part in classes(kind).values()]
    texts = [row.paper for row in METHODS.values()] + [part.__doc__ for part in parts]
    named = {number for text in texts for number in papers.numbers(text)}
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    named |= set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", readme))
    assert named <= papers.TITLES.keys()


def test_the_table_of_papers_needs_no_torch():
    code = "import sys; import hf_lowrank.methods.papers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
