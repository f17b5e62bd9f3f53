"""The report shows what runs left behind, in a real browser, and says what it could not read."""

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import save_file

from hf_lowrank.observe import records


pytest.importorskip("matplotlib")
from hf_lowrank.observe.report import write_report  # noqa: E402
from hf_lowrank.observe.report.curves import _compared  # noqa: E402
from hf_lowrank.observe.report.page import summary_rows  # noqa: E402
from hf_lowrank.observe.report.runs import read_run  # noqa: E402
from hf_lowrank.observe.report.spectra import mean_spectrum, weight_change  # noqa: E402
from hf_lowrank.observe.report.subspaces import by_type  # noqa: E402


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MODULES = [
    f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
]
EVERY_FIGURE = {
    "loss_steps",
    "loss_seconds",
    "perplexity_steps",
    "perplexity_seconds",
    "perplexity_gap",
    "subspaces_2",
    "energy",
    "update_rank",
    "spectrum",
    "memory",
    "step_times",
}


def history(offset=0.0):
    rows = [{"step": s, "loss": 4 - 0.01 * s + offset, "lowrank/state_mib": 1.5} for s in range(10, 101, 10)]
    rows += [{"step": s, "eval_loss": 4.1 - 0.01 * s + offset} for s in range(20, 101, 20)]
    rows += [{"step": s, "lowrank/update_rank": 9 - s / 20} for s in (50, 100)]
    return [*rows, {"step": 100, "train_runtime": 50.0, "train_loss": 3.5}]


def history_of_loss():
    return [(float(row["step"]), row["loss"]) for row in history() if "loss" in row]


def checkpoint(folder, step, scale):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    gen = torch.Generator().manual_seed(0)
    save_file(
        {f"{name}.weight": scale * torch.randn(8, 12, generator=gen) for name in MODULES}, path / "model.safetensors"
    )


def make_run(folder, *, ours=True, offset=0.0):
    """Write the folder of a run, as Trainer and the callback leave it."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history(offset)}))
    for step, scale in ((50, 1.0), (100, 1.5)):
        checkpoint(folder, step, scale)
    if ours:
        names = [f"{name}.weight" for name in MODULES]
        memory = dict.fromkeys(("weights", "gradients", "low_rank_state", "dense_state"), 2**20)
        memory |= {"adamw_gradients": 2**20, "adamw_state": 4 * 2**20}
        described = {"optimizer": "galore_i3s_adamw", "groups": [{"rank": 4, "param_names": names}], "memory": memory}
        (folder / records.RUN_FILE).write_text(json.dumps(described))
        for number, step in enumerate((1, 26, 51, 76), 1):
            values = {"overlap": 0.5, "overlap_first": 0.3} if number > 1 else {}
            values |= {"energy": 0.8, "stable_rank": 3.0}
            rows = [{"step": step, "module": name, "refresh": number, **values} for name in MODULES]
            records.append(folder / records.REFRESH_FILE, rows)
        steps = [
            {
                "step": s,
                "ms": 9.0 + 5 * (s % 25 == 1),
                "optimizer_ms": 2.0,
                "refreshes": 6 * (s % 25 == 1),
                "seconds": s / 2,
            }
            for s in range(1, 101)
        ]
        records.append(folder / records.STEPS_FILE, steps)
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A report on a run of AdamW and one of ours."""
    root = tmp_path_factory.mktemp("runs")
    runs = [make_run(root / "adamw", ours=False), make_run(root / "i3s <&>", offset=-0.1)]
    return write_report(runs, root / "report")


def test_every_figure_is_there_on_the_page_and_as_a_file(compared):
    assert set(compared.figures) == EVERY_FIGURE
    assert compared.problems == ()
    page = compared.page.read_text()
    for name in compared.figures:
        assert f'<figure id="{name}">' in page
        assert (compared.page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert page.count("<svg ") == len(compared.figures)


def test_the_page_loads_nothing_and_runs_nothing(compared):
    page = compared.page.read_text()
    assert "<script" not in page and "<link" not in page and "@import" not in page
    loaded = re.findall(r'(?:src|href)="(?!#)([^"]*)"', page)
    assert loaded == []  # references inside the page begin with #
    assert not re.findall(r"url\((?!#)", page)
    assert "i3s &lt;&amp;&gt;" in page and "i3s <&>" not in page


def test_the_page_is_well_formed_and_its_ids_are_unique(compared):
    opened, ids = [], []

    class Check(HTMLParser):
        def handle_starttag(self, tag, attributes):
            ids.extend(value for key, value in attributes if key == "id")
            if tag not in ("meta", "br"):
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Check().feed(compared.page.read_text())
    assert opened == []
    assert len(ids) == len(set(ids))


def render(page, out, width, height, *, dark=False):
    """Open a page in a real browser without a window; return its log."""
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    arguments += [f"--window-size={width},{height}", f"--screenshot={out}", f"--user-data-dir={out}.profile"]
    arguments += ["--blink-settings=preferredColorScheme=0"] if dark else []
    environment = {**os.environ, "HOME": str(out.parent)}
    command = [CHROMIUM, *arguments, page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
@pytest.mark.parametrize(("width", "height", "dark"), [(390, 7000, False), (1280, 3200, True)], ids=["phone", "dark"])
def test_a_real_browser_draws_it_on_a_phone_and_in_the_dark(compared, tmp_path, width, height, dark):
    from matplotlib.image import imread

    log = render(compared.page, tmp_path / "page.png", width, height, dark=dark)
    assert "CONSOLE" not in log  # neither script errors nor refused loads
    image = imread(tmp_path / "page.png")[..., :3]
    assert image.shape[:2] == (height, width)
    background = image[2, 2]
    assert (background.max() < 0.2) if dark else (background.min() > 0.95)
    drawn = abs(image - background).max(-1) > 0.2
    assert drawn.any(1).sum() > 0.3 * height  # the figures fill the page, top to bottom
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # both runs are there
        assert (abs(image * 255 - colour).max(-1) < 12).sum() > 500


@pytest.mark.processes
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium)")
def test_a_phone_need_not_scroll_sideways(compared, tmp_path):
    """The page is measured by a frame around it, which is where the only script is."""
    frame = tmp_path / "frame.html"
    inner = compared.page.read_text().replace("&", "&amp;").replace('"', "&quot;")
    script = (
        "const d = document.querySelector('iframe').contentDocument;"
        "const boxes = [...d.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect());"
        "const smallest = Math.min(...boxes.map(b => Math.min(b.width, b.height)));"
        "const right = Math.max(...boxes.map(b => b.right));"
        "const width = d.documentElement.scrollWidth;"
        "document.title = JSON.stringify({width, figures: boxes.length, smallest, right});"
    )
    frame.write_text(f'<iframe style="width:390px;height:800px;border:0" srcdoc="{inner}" onload="{script}"></iframe>')
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command = [CHROMIUM, *arguments, f"--user-data-dir={tmp_path}/profile", frame.as_uri()]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)}
    )
    measured = json.loads(re.search(r"<title>(.*?)</title>", result.stdout)[1].replace("&quot;", '"'))
    assert measured["figures"] == len(EVERY_FIGURE)
    assert measured["width"] <= 390 and measured["right"] <= 390
    assert measured["smallest"] > 80  # none has collapsed


def test_a_gap_is_the_difference_of_perplexities(tmp_path):
    runs = [make_run(tmp_path / "a", ours=False), make_run(tmp_path / "b", offset=-0.1)]
    points = [read_run(run).curve("eval_loss") for run in runs]
    assert [step for step, _ in points[0]] == [20, 40, 60, 80, 100]
    gap = math.exp(points[1][0][1]) - math.exp(points[0][0][1])
    assert gap == pytest.approx(math.exp(3.8) - math.exp(3.9))


def test_means_by_type_take_a_staggered_round_of_refreshes_together(tmp_path):
    run = make_run(tmp_path / "a")
    (run / records.REFRESH_FILE).unlink()
    rows = [
        {"step": step, "module": f"layers.{i}.self_attn.q_proj", "refresh": 1, "energy": energy}
        for i, (step, energy) in enumerate(((10, 0.2), (20, 0.4)))
    ]
    records.append(run / records.REFRESH_FILE, rows)
    assert by_type(read_run(run), "energy") == {"q": [(15.0, pytest.approx(0.3))]}


def test_the_spectrum_is_that_of_the_difference_of_weights(tmp_path):
    run = read_run(make_run(tmp_path / "a"))
    steps, spectra = weight_change(run, 1)
    assert steps == (50, 100)
    assert {name.split(".")[-2] for name in spectra} == {"q_proj", "v_proj", "down_proj"}
    gen = torch.Generator().manual_seed(0)
    sigma = torch.linalg.svdvals(0.5 * torch.randn(8, 12, generator=gen))  # weights x 1.5 less weights
    assert spectra["model.layers.0.self_attn.q_proj.weight"] == pytest.approx((sigma / sigma[0]).tolist(), rel=1e-4)
    shares, mean = mean_spectrum([[1.0, 0.1], [1.0, 0.001]], points=2)
    assert shares == [0.0, 1.0] and mean == pytest.approx([1.0, 0.01])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.self_attn.q_proj", "q"),
        ("model.layers.3.mlp.gate_proj.weight", "gate"),
        ("transformer.h.0.attn.c_proj", "o"),
        ("transformer.h.0.mlp.c_proj", "down"),
        ("transformer.h.0.mlp.c_fc", "up"),
        ("transformer.h.0.attn.c_attn", "other"),
        ("roberta.encoder.layer.1.attention.self.query", "q"),
        ("roberta.encoder.layer.1.attention.output.dense", "o"),
        ("roberta.encoder.layer.1.intermediate.dense", "up"),
        ("roberta.encoder.layer.1.output.dense", "down"),
        ("encoder.block.0.layer.0.SelfAttention.o", "o"),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0", "gate"),
        ("model.layers.0.mlp.experts.down_proj", "down"),
        ("classifier.dense", "other"),
    ],
)
def test_module_types(name, kind):
    assert records.module_type(name) == kind


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message", "still"),
    [
        (lambda run: cut(run / "trainer_state.json"), "trainer_state.json is not valid JSON", "step_times"),
        (lambda run: (run / "trainer_state.json").write_text(""), "trainer_state.json is empty", "memory"),
        (lambda run: (run / "trainer_state.json").unlink(), "no trainer_state.json", "energy"),
        (lambda run: (run / "trainer_state.json").write_text("[]"), "has no log history", "energy"),
        (lambda run: cut(run / records.REFRESH_FILE), "1 unreadable line left out", "subspaces_1"),
        (lambda run: cut(run / records.RUN_FILE), "hf_lowrank.json is not valid JSON", "loss_steps"),
        (lambda run: cut(run / "checkpoint-100/model.safetensors"), None, "loss_steps"),
    ],
)
def test_a_damaged_folder_says_so_and_shows_the_rest(damage, message, still, tmp_path):
    run = make_run(tmp_path / "run")
    damage(run)
    report = write_report([run], tmp_path / "out")
    assert still in report.figures
    assert message is None or any(message in problem for problem in report.problems)
    assert all(problem.replace("<", "&lt;") in report.page.read_text() for problem in report.problems)


def test_a_run_that_was_killed_is_read_from_its_last_whole_checkpoint(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "trainer_state.json").rename(run / "checkpoint-50" / "trainer_state.json")
    (run / "checkpoint-100" / "trainer_state.json").write_text('{"log_hist')
    read = read_run(run)
    assert read.curve("loss")
    assert any("checkpoint-100/trainer_state.json is not valid JSON" in problem for problem in read.problems)


def test_one_broken_folder_among_several_does_not_stop_the_others(tmp_path):
    (tmp_path / "empty").mkdir()
    report = write_report([make_run(tmp_path / "good"), tmp_path / "empty", tmp_path / "absent"], tmp_path / "out")
    assert "loss_steps" in report.figures
    assert any("empty: " in problem and "nothing to draw" in problem for problem in report.problems)
    assert any("there is no such folder" in problem for problem in report.problems)


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    rows = [*history(), {"step": 110, "loss": float("nan")}, {"step": 120, "eval_loss": float("inf")}, {"loss": 1}, 7]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    report = write_report([run], tmp_path / "out")
    assert "loss_steps" in report.figures
    assert report.problems == (f"{run}: losses from step 110 on are not finite numbers: the run diverged",)


@pytest.mark.parametrize("damage", ["not finite", "another shape", "no index"])
def test_weights_that_cannot_be_compared_take_no_run_with_them(damage, tmp_path):
    bad = make_run(tmp_path / "bad")
    wrong = torch.full((8, 12), math.nan) if damage == "not finite" else torch.ones(9, 12)
    save_file({f"{name}.weight": wrong.clone() for name in MODULES}, bad / "checkpoint-100" / "model.safetensors")
    if damage == "no index":
        (bad / "checkpoint-100" / "model.safetensors.index.json").write_text("[]")
    else:
        with pytest.raises(ValueError, match="weights of checkpoints 50 and 100 are not finite, or of other shapes"):
            weight_change(read_run(bad), 1)
    report = write_report([make_run(tmp_path / "good"), bad], tmp_path / "out")
    assert {"spectrum", "loss_steps"} <= set(report.figures)


def test_a_run_that_went_on_after_its_end_is_read_from_its_last_checkpoint(tmp_path):
    run = make_run(tmp_path / "run")
    later = [*history(), {"step": 150, "loss": 2.0}]
    (run / "checkpoint-100").rename(run / "checkpoint-150")
    (run / "checkpoint-150" / "trainer_state.json").write_text(json.dumps({"log_history": later}))
    assert read_run(run).curve("loss")[-1] == (150.0, 2.0)
    other = [{"step": s, "loss": 9.0} for s in range(10, 1001, 10)]  # of a run that was there before
    (run / "checkpoint-150" / "trainer_state.json").write_text(json.dumps({"log_history": other}))
    assert read_run(run).curve("loss")[-1] == history_of_loss()[-1]


def test_the_table_counts_all_steps_and_all_sessions(tmp_path):
    run = make_run(tmp_path / "run", ours=False)
    rows = [*history(), {"step": 160, "train_runtime": 30.0, "train_loss": 3.0}]  # logged too rarely for a second loss
    (run / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    read = read_run(run)
    (row,) = summary_rows([read])
    assert (row["steps"], row["seconds"]) == ("160", "80")
    assert read.seconds()[0](80.0) == pytest.approx(40.0)


def test_names_of_folders_are_shown_as_they_are(tmp_path):
    pytest.importorskip("matplotlib")
    report = write_report([make_run(tmp_path / "_old"), make_run(tmp_path / "a$b_{$")], tmp_path / "out")
    svg = report.page.read_text()
    assert svg.count("_old</text>") >= 2 and svg.count("a$b_{$</text>") >= 2


def test_runs_of_the_same_name_are_told_apart_by_their_folders(tmp_path):
    runs = [make_run(tmp_path / "a" / "out"), make_run(tmp_path / "b" / "out")]
    page = write_report(runs, tmp_path / "report").page.read_text()
    assert "a/out" in page and "b/out" in page


@pytest.mark.parametrize("value", ["null", "NaN", "1e400", "-1e308", '"x"', "[]", "{}", "true"])
def test_values_that_no_run_writes_are_left_out(value, tmp_path):
    """Whatever number is damaged, the others are drawn."""
    run = tmp_path / "run"
    run.mkdir()
    losses = '{"step": 1, "loss": 2}, {"step": 2, "loss": 1}, {"step": 3, "loss": %s}, {"step": %s, "loss": 1}'
    (run / "trainer_state.json").write_text('{"log_history": [%s]}' % (losses % (value, value)))
    (run / "hf_lowrank.json").write_text(
        '{"optimizer": %s, "groups": [%s], "memory": {"weights": %s}}' % ((value,) * 3)
    )
    rows = '{"step": 1, "module": "a.q_proj", "refresh": 1, "energy": 0.5, "ms": 3.0, "seconds": 0.1}\n'
    broken = rows.replace('"step": 1', f'"step": {value}') + rows.replace("0.5", value).replace("3.0", value)
    for name in ("hf_lowrank_refreshes.jsonl", "hf_lowrank_steps.jsonl"):
        (run / name).write_text(
            rows + broken + rows.replace("0.1", value).replace('"refresh": 1', f'"refresh": {value}')
        )
    report = write_report([run], tmp_path / "out", matrices=0)
    assert {"loss_steps", "energy", "step_times"} <= set(report.figures)


def classifier(folder, *, ours=True, offset=0.0, named=True):
    """Write the folder of a run on a GLUE task: losses, two metrics, and what the model is."""
    folder.mkdir(parents=True)
    rows = [{"step": s, "loss": 0.9 - 0.005 * s} for s in range(10, 101, 10)]
    rows += [
        {
            "step": s,
            "eval_loss": 0.8 - 0.003 * s,
            "eval_accuracy": 0.5 + 0.004 * s + offset,
            "eval_matthews_correlation": 0.1 + 0.005 * s,
            "eval_runtime": 1.0,
            "eval_samples_per_second": 100.0,
            "eval_steps_per_second": 10.0,
            "eval_model_preparation_time": 0.1,
        }
        for s in (50, 100)
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    if ours:
        described = {"optimizer": "galore_i3s_adamw", "groups": [{"rank": 4}]}
        described |= {"model": "RobertaForSequenceClassification"} if named else {}
        (folder / records.RUN_FILE).write_text(json.dumps(described))
    elif named:
        (folder / "config.json").write_text(json.dumps({"architectures": ["BertForSequenceClassification"]}))
    return folder


@pytest.mark.parametrize("named", [True, False])
def test_a_classifiers_metrics_are_called_by_their_names(named, tmp_path):
    runs = [
        classifier(tmp_path / "adamw", ours=False, named=named),
        classifier(tmp_path / "i3s", offset=0.1, named=named),
    ]
    assert [read_run(run).language_model for run in runs] == [False, False]
    report = write_report(runs, tmp_path / "report")
    page = report.page.read_text()
    assert {"loss_steps", "metrics_steps", "accuracy_gap"} <= set(report.figures)
    assert "erplexity" not in page and "nats per token" not in page
    assert "Accuracy and matthews correlation against steps" in page
    row = summary_rows([read_run(runs[1])])[0]
    assert (row["accuracy"], row["matthews correlation"]) == ("1", "0.6")
    assert "runtime" not in page and "per second" not in page.replace("ms per step", "")


def test_a_gap_of_a_metric_is_its_difference(tmp_path):
    runs = [
        read_run(classifier(tmp_path / name, offset=offset, ours=False)) for name, offset in (("a", 0.0), ("b", 0.1))
    ]
    what, source, curves = _compared(runs)
    assert (what, source) == ("accuracy", "validation")
    assert [y - x for (_, x), (_, y) in zip(*curves, strict=True)] == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("place", ["", "checkpoint-100"])
def test_a_language_model_that_is_also_scored_keeps_its_perplexity(place, tmp_path):
    run = make_run(tmp_path / "clm", ours=False)
    rows = [*history(), {"step": 100, "eval_accuracy": 0.4}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    assert not read_run(run).language_model  # nothing says so
    (run / place / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert read_run(run).language_model
    report = write_report([run], tmp_path / "report", matrices=0)
    assert {"perplexity_steps", "metrics_steps"} <= set(report.figures)
    assert summary_rows([read_run(run)])[0].keys() >= {"perplexity", "accuracy"}


def test_gauges_are_drawn_as_the_run_declares_them(tmp_path):
    run = make_run(tmp_path / "run")
    described = json.loads((run / records.RUN_FILE).read_text())
    described["gauges"] = {"how_loud": {"help": "loudness of <it>", "counted": False}, "never_logged": {"help": "x"}}
    (run / records.RUN_FILE).write_text(json.dumps(described))
    rows = [*history(), *({"step": s, "loss": 1.0, "lowrank/how_loud": s / 50} for s in (10, 60, 110))]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": rows}))
    report = write_report([make_run(tmp_path / "adamw", ours=False), run], tmp_path / "report", matrices=0)
    assert "gauges" in report.figures
    page = report.page.read_text()
    assert "how loud: loudness of &lt;it&gt;." in page and "never logged" not in page
