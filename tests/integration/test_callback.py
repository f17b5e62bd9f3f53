"""What the callback logs is what the optimizer did."""

import io
import json
import logging
import math
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import arguments, engine, tiny_llama, train
from processes import on_processes
from transformers import TrainerCallback

import hf_lowrank
from hf_lowrank import (
    METHODS,
    LowRankCallback,
    LowRankOptimizer,
    LowRankTrainer,
    Method,
    Reconstruction,
    Subspace,
    Update,
    param_groups,
)
from hf_lowrank.hf import console
from hf_lowrank.methods.registry import Gauge
from hf_lowrank.observe import metrics
from hf_lowrank.observe.describe import summary
from hf_lowrank.observe.first import FirstSubspaces
from hf_lowrank.observe.progress import FirstRefresh
from hf_lowrank.observe.update_rank import UpdateRank
from hf_lowrank.state import view


TYPES = {"q", "k", "v", "o", "gate", "up", "down"}


def lines(folder):
    return [json.loads(line) for line in (folder / "hf_lowrank_refreshes.jsonl").read_text().splitlines()]


def test_every_training_log_has_the_metrics(tmp_path):
    t = train(arguments(tmp_path, "galore_i3s_adamw"))
    rows = [row for row in t.state.log_history if "loss" in row]
    expected = {"overlap", "overlap_first", "energy", "stable_rank", "refreshes", "refresh_ms", "skipped", "state_mib"}
    refreshed_keys = {"overlap", "overlap_first", "energy", "stable_rank"}
    for step, row in enumerate(rows, 1):
        found = {key.removeprefix("lowrank/") for key in row if key.startswith("lowrank/")}
        unknown = {"overlap", "overlap_first"} if step < 4 else set()  # the first basis has none before it
        refreshed = step % 3 == 1
        types = {f"{key}/{kind}" for key in refreshed_keys - unknown for kind in TYPES} if refreshed else set()
        assert found == (expected - unknown) | types
        assert row["lowrank/refreshes"] == 14 * (1 + (step - 1) // 3)
        assert row["lowrank/skipped"] == 0
        assert (row["lowrank/refresh_ms"] > 0.5) == refreshed or row["lowrank/refresh_ms"] >= 0
    final = next(row for row in t.state.log_history if "train_runtime" in row)
    assert not any(key.startswith("lowrank/") for key in final)


def test_state_mib_is_the_bytes_in_memory(tmp_path):
    t = train(arguments(tmp_path, "fira_i3s_adamw"))
    measured = sum(view.nbytes(s) for s in engine(t).state.values())
    declared = engine(t).declared_bytes()
    assert measured == declared
    assert t.state.log_history[0]["lowrank/state_mib"] == pytest.approx(measured / 2**20, abs=5e-4)


def test_overlap_and_energy_are_those_of_the_bases(tmp_path):
    bases, gradients = {}, {}

    class Watch(LowRankCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            self.before = {n: s["basis"].clone() for n, s in matrices(kwargs)}
            gradients.update({n: p.grad.clone() for n, p in weights(kwargs)})

        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            for name, s in matrices(kwargs):
                if state.global_step == 4:
                    bases[name] = (self.before[name], s["basis"].clone(), gradients[name])

    def weights(kwargs):
        return [(n, p) for n, p in kwargs["model"].named_parameters() if "_proj" in n]

    def matrices(kwargs):
        optimizer = kwargs["optimizer"].optimizer  # below accelerate's wrapper
        return [(n, optimizer.state[p]) for n, p in weights(kwargs) if optimizer.state.get(p)]

    train(arguments(tmp_path, "galore_dominant_adamw", max_steps=4), callbacks=[Watch()])
    rows = {row["module"]: row for row in lines(tmp_path) if row["step"] == 4}
    assert len(rows) == len(bases) == 14
    for name, (old, new, grad) in bases.items():
        row = rows[name.removesuffix(".weight")]
        G = grad.mT if grad.shape[0] >= grad.shape[1] else grad
        sigma = torch.linalg.svdvals(G.double())
        r = new.shape[1]
        assert row["overlap"] == pytest.approx(((new.T @ old).square().sum() / r).item(), abs=1e-5)
        # the dominant basis captures the leading singular values; fp32 Gram matrices, hence 1e-4
        assert row["energy"] == pytest.approx((sigma[:r].square().sum() / sigma.square().sum()).item(), abs=1e-4)
        assert row["stable_rank"] == pytest.approx((sigma.square().sum() / sigma[0] ** 2).item(), rel=1e-4)


def test_a_line_per_refresh_and_none_doubled_by_a_second_callback(tmp_path):
    train(arguments(tmp_path, "galore_random_adamw"), callbacks=[LowRankCallback()])
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [1] * 14 + [4] * 14 + [7] * 14
    assert all("stable_rank" not in row for row in rows)  # this rule does not look at the gradient
    assert len({(row["module"], row["refresh"]) for row in rows}) == len(rows)


def test_a_skipped_step_is_counted(tmp_path):
    class Poison(LowRankCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                kwargs["model"].model.layers[0].mlp.up_proj.weight.grad[0, 0] = float("nan")

    t = train(arguments(tmp_path, "galore_i3s_adamw", max_grad_norm=0), tiny_llama(), callbacks=[Poison()])
    counts = [row["lowrank/skipped"] for row in t.state.log_history if "loss" in row]
    assert counts == [0, 0, 1, 1, 1, 1, 1, 1]


def test_metrics_reach_tensorboard_and_trainer_state(tmp_path):
    seen = []

    class Reporter(LowRankCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    train(
        arguments(tmp_path, "galore_i3s_adamw", save_strategy="steps", save_steps=4, max_steps=4),
        callbacks=[Reporter()],
    )
    assert all("lowrank/energy" in logs for logs in seen if "loss" in logs)  # a reporter comes after us
    saved = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert "lowrank/energy" in saved["log_history"][0]


def test_the_mean_by_type_is_that_of_its_matrices(tmp_path):
    t = train(arguments(tmp_path, "galore_i3s_adamw", max_steps=4))
    row = next(row for row in t.state.log_history if row["step"] == 4)
    per_matrix = {line["module"]: line for line in lines(tmp_path) if line["step"] == 4}
    for key in ("overlap", "energy", "stable_rank", "overlap_first"):
        queries = [line[key] for name, line in per_matrix.items() if name.endswith("q_proj")]
        assert len(queries) == 2
        assert row[f"lowrank/{key}/q"] == pytest.approx(sum(queries) / 2, abs=2e-6)


def test_a_run_resumed_before_a_first_subspace_compares_with_its_own(tmp_path):
    """The folder has sketches of the run that went on: of layers that were trained after the checkpoint."""
    options = "rank=4,update_proj_gap=2,stagger=false,layer_sampling=lisa,sampled_layers=1,switch_every=4"
    args = {"optim_args": options, "max_steps": 8}
    whole = train(arguments(tmp_path, "galore_i3s_adamw", save_strategy="steps", save_steps=2, **args))
    kept = [(line["step"], line["module"], line.get("overlap_first")) for line in lines(tmp_path)]
    resumed = train(arguments(tmp_path, "galore_i3s_adamw", **args), resume=str(tmp_path / "checkpoint-2"))
    assert [(line["step"], line["module"], line.get("overlap_first")) for line in lines(tmp_path)] == kept
    rows = [[row for row in t.state.log_history if "loss" in row] for t in (whole, resumed)]
    firsts = [[row.get("lowrank/overlap_first") for row in some] for some in rows]
    assert firsts[0] == firsts[1] and any(value is not None for value in firsts[0])


def test_the_overlap_with_the_first_subspace_is_that_of_the_bases(tmp_path):
    first = {}

    class Watch(LowRankCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for name, _, s in metrics.matrices(kwargs["optimizer"].optimizer):
                first.setdefault(name, s["basis"].clone())

    t = train(arguments(tmp_path, "galore_dominant_adamw", max_steps=7), callbacks=[Watch()])
    logged = {line["module"]: line["overlap_first"] for line in lines(tmp_path) if line["step"] == 7}
    assert len(logged) == 14
    for name, _, s in metrics.matrices(engine(t)):
        direct = (s["basis"].mT @ first[name]).square().sum() / 4
        assert logged[name] == pytest.approx(direct.item(), abs=4e-3)  # entries of the first one are rounded to bf16


def test_the_sketch_of_the_first_subspace_estimates_its_overlap():
    gen = torch.Generator().manual_seed(0)
    m, r = 400, 128
    first, second = (torch.linalg.qr(torch.randn(m, r, generator=gen))[0] for _ in range(2))
    half = torch.cat([first[:, : r // 2], second[:, r // 2 :]], 1)  # shares half of the first one
    half = torch.linalg.qr(half)[0]
    firsts = FirstSubspaces()
    assert firsts.overlap("a", first) is None
    for basis in (first, second, half):
        exact = (basis.mT @ first).square().sum() / r
        assert firsts.overlap("a", basis) == pytest.approx(exact.item(), abs=3 * math.sqrt(2 / (32 * r)))


@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (16, 160)])  # also fewer rows than columns of the sketch
def test_the_effective_rank_is_exact_where_asked_and_near_where_estimated(shape):
    gen = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, min(shape), generator=gen))[0] for n in shape)
    for k in (1, 4, min(shape)):
        change = U[:, :k] @ V[:, :k].T  # k equal singular values: effective rank k
        weights = {f"w{i}": torch.randn(shape, generator=gen) for i in range(8)}
        exact, estimate = UpdateRank(exact=True), UpdateRank()
        for measure in (exact, estimate):
            assert measure.measure(weights.items()) == {}
        changed = {name: W + change for name, W in weights.items()}
        # fp32 rounding of W + D is a perturbation of full rank with 1e-7 of ||W||: 1e-5 of the result
        assert exact.measure(changed.items())["w0"] == pytest.approx(k, rel=1e-3)
        found = estimate.measure(changed.items())
        assert sum(found.values()) / 8 == pytest.approx(k, rel=0.15)  # 10 % for one, of eight
        assert exact.measure(changed.items()) == {}  # nothing has changed since


@dataclass(frozen=True)
class Watched(Reconstruction):
    """U = alpha P N, with two numbers for the log."""

    gauges: ClassVar = {
        "loudness": Gauge("the number of steps so far"),
        "odd": Gauge("whether the step's number is odd", counted=True),
    }

    def combine(self, s, norms, R, N, c_t, ctx):
        s["loudness"].fill_(ctx.step + 1)
        s["odd"].add_((ctx.step + 1) % 2)
        return Update(N, ctx.scale)


@pytest.fixture
def watched(monkeypatch):
    """A method of one's own, whose part declares gauges that nothing here has heard of."""
    monkeypatch.setitem(METHODS, "watched", Method("dominant", "adam", Watched(), "a method to look at", "-"))
    return "watched"


def train_watched(folder, name, resume=None, **overrides):
    model, args = tiny_llama(), arguments(folder, "adamw_torch", **overrides)
    pair = hf_lowrank.optimizer_cls_and_kwargs(model, name, args=args, rank=4, update_proj_gap=3)
    return train(args, model, resume=resume, optimizer_cls_and_kwargs=pair)


def test_a_gauge_that_a_part_declares_is_in_log_lines_file_console_and_report(watched, tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_lowrank")
    t = train_watched(tmp_path, watched, logging_steps=4)
    logged = [row for row in t.state.log_history if "loss" in row]
    assert [row["lowrank/loudness"] for row in logged] == [4, 8]  # the value at the last step
    assert [row["lowrank/odd"] for row in logged] == [0.5, 0.5]  # of the steps since the last log
    assert all(
        {f"lowrank/{key}/{kind}" for key in ("loudness", "odd") for kind in TYPES} < row.keys() for row in logged
    )
    shown = {row["step"]: (row["loudness"], row["odd"]) for row in lines(tmp_path)}
    assert shown == {1: (1, 1.0), 4: (4, pytest.approx(1 / 3, abs=1e-6)), 7: (7, pytest.approx(2 / 3, abs=1e-6))}
    described = json.loads((tmp_path / "hf_lowrank.json").read_text())["gauges"]
    assert described["odd"] == {"help": "whether the step's number is odd", "counted": True}
    assert described["loudness"] == {"help": "the number of steps so far", "counted": False}
    said = [record.getMessage() for record in caplog.records if "refreshed" in record.getMessage()]
    assert said[0].endswith("; loudness 4; odd in 50% of the steps")
    pytest.importorskip("matplotlib")
    from hf_lowrank.observe.report import write_report

    t.save_state()
    report = write_report([tmp_path], tmp_path / "report", matrices=0)
    page = report.page.read_text()
    assert "gauges" in report.figures
    assert "loudness: the number of steps so far; odd: whether the step&#x27;s number is odd" in page


def test_a_counted_gauges_share_survives_a_resume_between_two_logs(watched, tmp_path):
    rhythm = {"logging_steps": 3, "save_strategy": "steps", "save_steps": 1, "max_steps": 7}

    def shares(trainer):
        return [(row["step"], row["lowrank/odd"]) for row in trainer.state.log_history if "lowrank/odd" in row]

    whole = train_watched(tmp_path / "whole", watched, **rhythm)
    # steps 1 and 3 of three are odd, then step 5 alone
    assert shares(whole) == [(3, pytest.approx(2 / 3, abs=1e-6)), (6, pytest.approx(1 / 3, abs=1e-6))]
    for step in (1, 4, 5):
        resumed = train_watched(
            tmp_path / str(step), watched, resume=str(tmp_path / f"whole/checkpoint-{step}"), **rhythm
        )
        assert shares(resumed) == shares(whole)
        ours = {(row["step"], row["module"]): row["odd"] for row in lines(tmp_path / str(step))}
        theirs = {(row["step"], row["module"]): row["odd"] for row in lines(tmp_path / "whole")}
        assert ours and all(theirs[key] == share for key, share in ours.items())


class Crash(LowRankCallback):
    """Fails in the middle of step 4, as a user's Ctrl-C does."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_lines_of_all_finished_steps_outlive_a_crash(error, tmp_path):
    args = arguments(tmp_path, "galore_i3s_adamw", logging_steps=100)
    with pytest.raises(error):
        train(args, callbacks=[Crash(error())])
    steps = [json.loads(line)["step"] for line in (tmp_path / "hf_lowrank_steps.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert {row["step"] for row in lines(tmp_path)} == {1}


def test_the_summary_line_is_said_once_when_training_begins_with_the_rate_of_the_peak(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_lowrank")
    t = train(arguments(tmp_path, "galore_i3s_adamw", max_steps=1, warmup_steps=1), callbacks=[LowRankCallback()])
    said = [record.getMessage() for record in caplog.records if "matrices at rank" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("galore_i3s_adamw: 14 matrices at rank 4, lr 0.0025 (0.01 x scale 0.25)")
    assert f"state {engine(t).declared_bytes() / 2**20:.1f} MiB" in said[0]


def test_the_summary_line_of_apollo_has_the_root_by_which_it_multiplies(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_lowrank")
    train(arguments(tmp_path, "apollo_mini_adamw", optim_args="scale=100", max_steps=1), callbacks=[LowRankCallback()])
    assert any("lr 0.1 (0.01 x 10, of scale 100)" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", ["galore_i3s_adamw_8bit", "full_muon_layerwise", "fira_adamw", "muon_4bit"])
def test_the_summary_line_has_the_whole_name(name):
    model = tiny_llama()
    assert summary(LowRankOptimizer(param_groups(model, method=name, rank=4), name)).startswith(f"{name}: 14 matrices")


def test_a_message_does_not_land_on_the_progress_bars_line():
    tqdm = pytest.importorskip("tqdm.auto").tqdm
    terminal = io.StringIO()
    with tqdm(total=3, file=terminal) as bar:
        bar.update(1)
        record = logging.LogRecord("hf_lowrank", logging.INFO, "", 0, "step 1: %s", ("refreshed",), None)
        console.BesideBars(terminal).handle(record)
        bar.update(1)
    text = terminal.getvalue()
    assert re.search(r"\d/3 [^\r\n]*\r +\rstep 1: refreshed\n\r", text)  # the bar is wiped, and drawn anew below
    assert any(isinstance(handler, console.BesideBars) for handler in logging.getLogger("hf_lowrank").handlers)


@pytest.mark.parametrize("by_registering", [True, False])
@pytest.mark.parametrize("bar", [True, False])
def test_the_console_shows_at_most_twelve_keys_and_reporters_get_all(bar, by_registering, tmp_path, capsys):
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    args = arguments(tmp_path, "fira_adamw", disable_tqdm=not bar, max_steps=4, logging_steps=4)
    if not by_registering:
        hf_lowrank.unregister()
    t = train(args, trainer_class=LowRankTrainer, callbacks=[Reporter()])
    out = capsys.readouterr()
    printed = re.findall(
        r"lowrank/[\w/]+", next(line for line in (out.out + out.err).splitlines() if "'loss'" in line)
    )
    whole = {key for key in t.state.log_history[0] if key.startswith("lowrank/")}
    assert len(whole) > 30 and whole == {key for key in seen[0] if key.startswith("lowrank/")}
    assert 0 < len(printed) <= 12 and not any(key.count("/") > 1 for key in printed)
    assert {"lowrank/overlap", "lowrank/limited", "lowrank/residual_share", "lowrank/state_mib"} < set(printed)


def test_a_method_with_many_gauges_does_not_flood_the_console():
    ours = {f"lowrank/{i}": i for i in range(20)} | {"lowrank/0/q": 1.0}
    assert console.shortened({"loss": 1.0, **ours, "epoch": 2.0}) == {
        "loss": 1.0,
        **{f"lowrank/{i}": i for i in range(12)},
        "epoch": 2.0,
    }


def test_unregistering_gives_the_printers_back():
    before = [printer.on_log for printer in console.PRINTERS]
    hf_lowrank.unregister()
    after = [printer.on_log for printer in console.PRINTERS]
    assert all(hasattr(f, "__wrapped__") for f in before) and not any(hasattr(f, "__wrapped__") for f in after)


def first_refresh(said, sizes, **options):
    weights = [torch.nn.Parameter(torch.randn(m, n)) for m, n in sizes]
    groups = [{"params": weights, "rank": 2, **options}]
    return weights, FirstRefresh(LowRankOptimizer(groups, "galore_dominant_adamw"), said.append)


def test_a_first_refresh_that_takes_long_says_how_far_it_is(monkeypatch):
    """Real steps of a few matrices, in a thread, that are made slow; the share of the work gives the estimate."""
    monkeypatch.setattr(FirstRefresh, "AFTER", 0.2)
    said = []
    weights, watch = first_refresh(said, [(8, 16)] * 4)
    watch.start(updating=True)
    began = time.perf_counter()
    for p in weights:  # one at a time: an optimizer leaves a weight without a gradient alone
        p.grad = torch.randn_like(p)
        watch.optimizer.step()
        p.grad = None
        time.sleep(0.15)
    watch.stop()
    assert time.perf_counter() - began > 0.5
    assert re.fullmatch(r"first subspaces: [1-3] of 4 matrices after 0 s, about \d s to go", said[0])
    count = len(said)
    time.sleep(0.5)
    assert len(said) == count <= 2  # after 0.2 and 0.4 s, and nothing more once it has been stopped


@dataclass(frozen=True)
class Slow(Subspace):
    """The dominant subspace, after a while."""

    def choose(self, s, G, ctx):
        time.sleep(0.05)
        U, sigma, _ = torch.linalg.svd(G.float(), full_matrices=False)
        return U[..., : s["basis"].shape[-1]], sigma


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_run_says_how_far_its_first_refresh_is_and_no_later_one(layerwise, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(METHODS, "slow", Method(Slow(), "adam", "project", "slow", "-"))
    monkeypatch.setattr(FirstRefresh, "AFTER", 0.25)
    caplog.set_level("INFO", logger="hf_lowrank")
    args, model = arguments(tmp_path, "adamw_torch", max_steps=4, max_grad_norm=0.0), tiny_llama()
    options = {"rank": 4, "update_proj_gap": 3, "stagger": False, "layerwise": layerwise}
    train(
        args, model, optimizer_cls_and_kwargs=hf_lowrank.optimizer_cls_and_kwargs(model, "slow", args=args, **options)
    )
    said = [record.getMessage() for record in caplog.records if "subspaces" in record.getMessage()]
    first = [i for i, text in enumerate(said) if text.startswith("first subspaces: ")]
    refreshed = [i for i, text in enumerate(said) if "subspaces refreshed" in text]
    assert 1 <= len(first) <= 2 and len(refreshed) == 2 and max(first) < min(refreshed)
    # 14 matrices of 0.05 s each, the costliest first where they are refreshed together
    assert re.fullmatch(r"first subspaces: \d+ of 14 matrices after 0 s, about \d s to go", said[first[0]])


def test_a_first_refresh_that_is_quick_or_over_says_nothing_and_one_that_failed_falls_silent(monkeypatch):
    monkeypatch.setattr(FirstRefresh, "AFTER", 0.05)
    said = []
    weights, watch = first_refresh(said, [(8, 16)])
    watch.start(updating=True)
    watch.stop()
    time.sleep(0.15)
    assert said == []
    weights[0].grad = torch.randn(8, 16)
    watch.optimizer.step()
    late = FirstRefresh(watch.optimizer, said.append)
    late.start(updating=True)  # as in a resumed run
    assert late.timer is None
    _, failed = first_refresh(said, [(8, 16)])
    failed.start(updating=True)
    time.sleep(0.4)
    assert said == ["first subspaces: 0 of 1 matrices after 0 s"]
    assert not failed.timer.is_alive() and threading.active_count() < 50


@pytest.mark.parametrize("name", ["fira_adamw", "apollo_random_adamw", "gwt_adamw"])
def test_every_method_with_a_limiter_says_how_often_it_was_active(name, tmp_path):
    t = train(arguments(tmp_path, name, logging_steps=4))
    shares = [row["lowrank/limited"] for row in t.state.log_history if "lowrank/limited" in row]
    assert len(shares) == 2 and all(0 <= share <= 1 for share in shares)


@pytest.mark.parametrize("name", ["galore_i3s_adamw", "fira_adamw"])
def test_a_resumed_run_has_the_same_rows_where_it_is_logged_and_saved_at_different_steps(name, tmp_path):
    rhythm = {"logging_steps": 3, "save_strategy": "steps", "save_steps": 2, "max_steps": 8}

    def rows(trainer):
        drop = ("refresh_ms", "train_loss", "grad_norm")
        found = [row for row in trainer.state.log_history if "train_runtime" not in row]
        return [{k: v for k, v in row.items() if not any(key in k for key in drop)} for row in found]

    whole = train(arguments(tmp_path / "whole", name, **rhythm))
    ranks = [row for row in rows(whole) if "lowrank/update_rank" in row]
    assert [row["step"] for row in ranks] == [2, 4, 6, 8]
    assert all({f"lowrank/update_rank/{kind}" for kind in TYPES} < row.keys() for row in ranks)
    assert all(1 <= row["lowrank/update_rank"] <= 16 for row in ranks)
    for step in (2, 4, 6):  # before and after a refresh, the last one logged as well
        resumed = train(arguments(tmp_path / "new", name, **rhythm), resume=str(tmp_path / f"whole/checkpoint-{step}"))
        ours = [{k: v for k, v in row.items() if k != "loss"} for row in rows(resumed)]
        # Trainer itself averages the loss of a window that a resume cuts over what is left of it
        assert ours == [{k: v for k, v in row.items() if k != "loss"} for row in rows(whole)]
    steps = [json.loads(line)["step"] for line in (tmp_path / "whole/hf_lowrank_steps.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_step_times_are_recorded_with_their_refreshes_and_resume_without_a_gap(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 5}
    train(arguments(tmp_path, "galore_i3s_adamw", **saving))
    train(arguments(tmp_path, "galore_i3s_adamw", **saving), resume=str(tmp_path / "checkpoint-5"))
    rows = [json.loads(line) for line in (tmp_path / "hf_lowrank_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["refreshes"] for row in rows] == [14, 0, 0, 14, 0, 0, 14, 0]
    assert all(0 < row["optimizer_ms"] < row["ms"] for row in rows)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_the_run_file_has_the_bytes_of_every_component(tmp_path):
    t = train(arguments(tmp_path, "fira_adamw", max_steps=1))
    memory = json.loads((tmp_path / "hf_lowrank.json").read_text())["memory"]
    weights = sum(p.nbytes for p in t.model.parameters())
    assert memory["weights"] == memory["gradients"] == weights
    assert memory["adamw_state"] == 2 * weights + 4 * len(list(t.model.parameters()))
    assert memory["low_rank_state"] + memory["dense_state"] == engine(t).declared_bytes()


def test_a_callback_given_by_hand_lends_its_arguments(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    mine = LowRankCallback(first_overlap=False, update_rank="off")
    t = train(arguments(tmp_path, "galore_i3s_adamw", **saving), callbacks=[mine])
    keys = {key for row in t.state.log_history for key in row}
    assert "lowrank/overlap" in keys
    assert not any("first" in key or "update_rank" in key for key in keys)
    assert not (tmp_path / "hf_lowrank_first_subspaces.pt").exists()
    with pytest.raises(ValueError, match="update_rank must be one of estimate, exact, off"):
        LowRankCallback(update_rank="all")


def test_a_refresh_is_one_line_on_the_console(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_lowrank")
    train(arguments(tmp_path, "fira_adamw", max_steps=6))
    said = [record.getMessage() for record in caplog.records if "refreshed" in record.getMessage()]
    assert len(said) == 2
    assert re.fullmatch(
        r"step 4: subspaces refreshed in \d+ ms; overlap 0\.\d\d with the one before \(least: \w+ 0\.\d\d\), "
        r"0\.\d\d with the first; \d+% of the gradient inside; stable rank \d\.\d; "
        r"residual share \d\.\d+; limited in \d+% of the steps",
        said[1],
    )


def test_what_has_no_subspace_says_nothing_of_one(tmp_path, caplog):
    caplog.set_level("INFO", logger="hf_lowrank")
    train(arguments(tmp_path, "muon_4bit", max_steps=2, optim_args=""))
    said = [record.getMessage() for record in caplog.records]
    assert any("stepped whole" in text for text in said) and not any("refreshed" in text for text in said)


def test_tensorboard_gets_every_metric(tmp_path, monkeypatch):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))  # transformers 5; 4.57 has an argument
    args = arguments(tmp_path, "galore_i3s_adamw", max_steps=4, report_to="tensorboard", save_strategy="no")
    train(args)
    folder = next(path.parent for path in tmp_path.rglob("events.out.tfevents*"))
    events = accumulators.EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"train/lowrank/{key}" for key in ("overlap", "overlap_first", "energy", "energy/q", "refresh_ms")} < tags
    assert [event.step for event in events.Scalars("train/lowrank/refreshes")] == [1, 2, 3, 4]


@pytest.mark.processes
@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.full), "SHARDED_STATE_DICT"])
def test_two_processes_write_each_line_once_and_measure_the_same(kind, tmp_path):
    result = on_processes(2, Path(__file__).parent / "parallel_worker.py", kind, "fira_adamw", tmp_path)
    assert (tmp_path / "report.json").exists(), result.stderr[-4000:]
    options = {"optim_args": "rank=4,update_proj_gap=2,stagger=false", "max_steps": 6, "max_grad_norm": 0.0}
    alone = arguments(tmp_path / "alone", "fira_adamw", save_strategy="steps", save_steps=3, **options)
    history = train(alone).state.log_history
    state_file = tmp_path / "first" / "checkpoint-6" / "trainer_state.json"
    shared = json.loads(state_file.read_text())["log_history"]
    assert [row["step"] for row in shared] == [row["step"] for row in history if "train_runtime" not in row]
    for ours, theirs in zip(shared, history, strict=False):
        assert ours.keys() == theirs.keys()
        for key in ours:
            if key.startswith("lowrank/") and key.split("/")[1] not in ("refresh_ms", "state_mib"):
                # gradients are summed in another order, and Adam amplifies that
                assert ours[key] == pytest.approx(theirs[key], rel=0.02, abs=1e-3), key
    for file in ("hf_lowrank_refreshes.jsonl", "hf_lowrank_steps.jsonl"):
        count = [len((tmp_path / run / file).read_text().splitlines()) for run in ("first", "alone")]
        assert count[0] == count[1]


@pytest.mark.full
def test_wandb_gets_every_metric_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for key, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(key, value)
    train(arguments(tmp_path, "galore_i3s_adamw", max_steps=4, report_to="wandb"))
    seen = dict(wandb.run.summary)
    wandb.finish()
    assert {f"train/lowrank/{key}" for key in ("overlap", "overlap_first", "energy/q", "refreshes")} < seen.keys()
    assert seen["train/lowrank/refreshes"] == 28


@pytest.mark.full
def test_trackio_gets_every_metric_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at import
    pytest.importorskip("trackio")
    train(arguments(tmp_path, "galore_i3s_adamw", max_steps=4, report_to="trackio"))
    stored = b"".join(file.read_bytes() for file in (tmp_path / "trackio").rglob("*.db*"))
    assert all(f"lowrank/{key}".encode() in stored for key in ("overlap", "overlap_first", "energy/q", "refreshes"))
