"""What the callback logs is what the optimizer did."""

import json

import pytest
import torch
from conftest import arguments, engine, tiny_llama, train

from hf_lowrank import LowRankCallback, state


def lines(folder):
    return [json.loads(line) for line in (folder / "hf_lowrank_refreshes.jsonl").read_text().splitlines()]


def test_every_training_log_has_the_metrics(tmp_path):
    t = train(arguments(tmp_path, "galore_i3s_adamw"))
    rows = [row for row in t.state.log_history if "loss" in row]
    expected = {"overlap", "energy", "stable_rank", "refreshes", "refresh_ms", "skipped", "state_mib"}
    for step, row in enumerate(rows, 1):
        found = {key.removeprefix("lowrank/") for key in row if key.startswith("lowrank/")}
        assert found == expected - ({"overlap"} if step < 4 else set())  # the first basis has none before it
        assert row["lowrank/refreshes"] == 14 * (1 + (step - 1) // 3)
        assert row["lowrank/skipped"] == 0
        refreshed = step % 3 == 1
        assert (row["lowrank/refresh_ms"] > 0.5) == refreshed or row["lowrank/refresh_ms"] >= 0
    final = next(row for row in t.state.log_history if "train_runtime" in row)
    assert not any(key.startswith("lowrank/") for key in final)


def test_state_mib_is_the_bytes_in_memory(tmp_path):
    t = train(arguments(tmp_path, "fira_i3s_adamw"))
    measured = sum(state.nbytes(s) for s in engine(t).state.values())
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
        optimizer = kwargs["optimizer"].optimizer
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
