"""The command line answers, teaches, and calls a user's mistake by its name."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest
from streams import COVERING

from hf_lowrank import METHODS


pytest.importorskip("typer")
from hf_lowrank import cli  # noqa: E402


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the console script; return (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-lowrank", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
            raise SystemExit(0)
        code = ended.value.code or 0
        return code, *capsys.readouterr()

    return call


def tiny_config(folder):
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_methods_lists_every_row_without_torch_in_under_a_second():
    script = (
        "import sys, time; sys.argv = ['hf-lowrank', 'methods']\n"
        "from hf_lowrank import cli\n"
        "try: cli.main()\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 1, time.process_time()  # of the whole process\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    shown = {line.split()[0] for line in result.stdout.splitlines() if line.strip()}
    assert set(METHODS) <= shown


def test_methods_as_json_and_by_pattern(run):
    code, out, _ = run("methods", "*_i3s_*", "--json")
    rows = json.loads(out)
    assert code == 0 and {row["name"] for row in rows} == {name for name in METHODS if "_i3s_" in name}
    assert rows[0]["subspace"] == "i3s" and "options" not in rows[0]
    _, out, _ = run("methods", "*_i3s_*", "--json", "--full")
    assert json.loads(out)[0]["state"] == "mr + 2nr"
    _, out, _ = run("methods", "fira_adamw_8bit_layerwise", "--json", "--details")  # a name with endings
    (row,) = json.loads(out)
    assert row["name"] == "fira_adamw" and row["options"]["limiter"] == 1.01
    code, out, _ = run("methods", "*_8bit", "--json")
    assert code == 0 and len(json.loads(out)) == len(METHODS)


def below(title, out):
    """Return the words that begin the lines of the table below a title."""
    lines = out.splitlines()
    start = lines.index(title) + 2  # without the head
    return [
        line.split()[0] for line in lines[start : lines.index("", start)] if line[0] != " "
    ]  # not of a cell's rest


def test_options_stand_below_the_part_that_has_them(run):
    _, out, _ = run("methods", "natural_galore_adamw", "--details")
    assert below("Subspace dominant", out) == ["refresh", "async_refresh"] and "rank" in below(
        "Every method, for its matrices", out
    )
    assert below("Moments natural_adam", out) == ["history", "damping", "damping_kind", "window"]
    _, out, _ = run("methods", "--full")
    assert {"queue_size", "threshold", "longest", "refresh"} <= {*below("Subspace lazy", out)}
    assert "threshold" not in below("Subspace grassmann", out) and "eta" in below("Subspace grassmann", out)
    state = next(line for line in out.splitlines() if line.startswith("apollo_random_adamw"))
    assert "2nr + 1" in state and "no reduce_projected" in state


def test_of_a_method_without_a_subspace_targets_speaks_of_none(run):
    _, out, _ = run("targets", "60m", "--optim", "full_adamw")
    assert "56 matrices stepped whole, 19 parameters dense" in out and "(0% less)" in out
    projections = [line.split() for line in out.splitlines() if "_proj" in line]
    assert {words[5] for words in projections} == {"whole"}
    rows = json.loads(run("targets", "60m", "--optim", "full_adamw", "--json")[1])
    assert all(row["whole"] is ("_proj" in row["name"]) for row in rows)


@pytest.mark.parametrize("name", COVERING)
def test_targets_takes_every_method_as_it_is(run, name):
    code, _, error = run("targets", "60m", "--optim", name, "--json")
    assert code == 0, error


def test_targets_says_what_would_be_projected_and_what_it_saves(run, tmp_path):
    arguments = ["targets", tiny_config(tmp_path), "--optim_args", "rank=4"]  # as Trainer spells it
    code, out, _ = run(*arguments, "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    query = rows["model.layers.*.self_attn.q_proj"]
    assert code == 0
    assert (query["count"], query["shape"], query["rank"]) == (2, [16, 16], 4)
    # basis 16 x 4 and two moments 4 x 16, in fp32; seven counters of 8 bytes, three numbers of the last refresh
    assert query["state_bytes"] == 2 * (4 * (16 * 4 + 2 * 4 * 16) + 7 * 8 + 3 * 4)
    assert query["adamw_bytes"] == 2 * (8 * 16 * 16 + 4)
    assert rows["model.embed_tokens"]["rank"] is None and rows["lm_head"]["rank"] is None
    _, out, _ = run(*arguments)
    assert "14 matrices in a subspace, 7 parameters dense" in out and "model.layers.*.mlp.down_proj" in out
    _, out, _ = run(*arguments, "--target-modules", "q_proj,v_proj", "--json")
    projected = {row["name"] for row in json.loads(out) if row["rank"]}
    assert projected == {"model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.v_proj"}


def test_targets_and_memory_agree(run, tmp_path):
    model = tiny_config(tmp_path)
    _, out, _ = run("targets", model, "--optim", "fira_adamw", "--optim-args", "rank=4", "--json")
    rows = json.loads(out)
    _, out, _ = run("memory", model, "--optim", "fira_adamw", "--rank", 4, "--json")
    (estimate,) = json.loads(out)
    assert estimate["low_rank_state"] == sum(row["state_bytes"] for row in rows if row["rank"])
    assert estimate["dense_state"] == sum(row["state_bytes"] for row in rows if not row["rank"])


def test_targets_and_memory_take_rates_and_rules_by_kind(run, tmp_path):
    for command in ("targets", "memory"):
        code, out, _ = run(command, tiny_config(tmp_path), "--optim-args", "rank=4,dense=sgd,vector_lr=1")
        assert code == 0 and (command == "memory" or "dense, sgd" in out)


def test_memory_counts_torchs_adamw_by_the_trainers_name(run):
    code, out, _ = run("memory", "60m", "--optim", "adamw_torch", "--json")
    (found,) = json.loads(out)
    counts = found["dense_state"] - 2 * found["weights"]  # beside two moments in the weights' own type
    assert code == 0 and 0 < counts < 1000 and counts % 4 == 0
    code, _, err = run("memory", "60m", "--optim", "adamw_torch", "--budget", "1GB")
    assert code == 2 and "unknown method 'adamw_torch'" in err


def test_targets_takes_what_the_trainer_takes(run):
    asked = "rank=128,layer_sampling=lisa,switch_every=5,shard_state=true"
    code, out, _ = run("targets", "60m", "--optim-args", asked, "--json")
    assert (code, out) == (0, run("targets", "60m", "--optim-args", "rank=128", "--json")[1])


def test_the_columns_of_memory_add_up_to_its_total(run):
    for options in ("layer_sampling=lisa", "rank=64"):  # the workspace is the larger one, or the activations are
        _, out, _ = run("memory", "60m", "--optim-args", options)
        *parts, total = map(float, re.findall(r"\d+\.\d\d", out.strip().splitlines()[-1]))
        assert abs(sum(parts) - total) < 0.031  # six numbers of two digits


def test_a_budget_takes_any_rank_and_the_plain_name(run):
    code, out, _ = run("memory", "60m", "--rank", 0.25, "--budget", "1GB", "--json")
    assert code == 0 and {row["rank"] for row in json.loads(out)} == {0.25}
    for asked in (["--optim", "galore_i3s_adamw_8bit_layerwise"], ["--checkpointing"]):
        code, _, err = run("memory", "60m", "--budget", "1GB", *asked)
        assert code == 2 and "give it galore_i3s_adamw alone" in err


def test_all_strategies_are_those_that_there_are_processes_for(run):
    for gpus, strategies in ((2, "ddp ddp_sharded fsdp2 tp"), (4, "ddp ddp_sharded fsdp2 hsdp tp")):
        code, out, err = run("memory", "60m", "--gpus", gpus, "--strategy", "all", "--json")
        assert code == 0 and [one["strategy"] for one in json.loads(out)] == strategies.split()
        assert ("left out hsdp" in err) == (gpus == 2)


def test_all_strategies_are_those_in_which_it_runs(run):
    command = [
        "memory",
        "9m",
        "--optim",
        "fira_adamw_layerwise",
        "--rank",
        8,
        "--gpus",
        4,
        "--strategy",
        "all",
        "--json",
    ]
    code, out, err = run(*command)
    assert code == 0 and [one["strategy"] for one in json.loads(out)] == ["fsdp2", "hsdp", "tp"]
    assert "left out ddp: fira_adamw_layerwise does not run so under ddp" in err and "left out ddp_sharded" in err
    code, out, err = run("memory", "9m", "--optim", "apollo_mini_adamw", "--rank", 1, "--json")
    assert code == 0 and json.loads(out)[0]["rank"] == 1


def test_memory_prints_every_part_and_what_fits_a_budget(run):
    code, out, _ = run("memory", "60m", "--rank", 128)
    assert code == 0 and "58.1 M parameters" in out and "total" in out
    code, out, _ = run("memory", "60m", "--budget", "1GB", "--json")
    assert code == 0 and all(row["total"] <= 1e9 for row in json.loads(out))
    code, out, err = run("memory", "60m", "--budget", "10MB")
    assert code == 1 and "does not fit into 10MB" in err


def test_report_writes_a_page(run, tmp_path):
    (tmp_path / "run").mkdir()
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    code, out, _ = run("report", tmp_path / "run", "--out", tmp_path / "out")
    assert code == 0 and "index.html (2 figures)" in out
    assert (tmp_path / "out" / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "galor_i3s_adamw"], "did you mean 'galore_i3s_adamw'"),
        (["methods", "galore_adamw_i3s"], "did you mean 'galore_i3s_adamw'"),
        (["targets", "60m", "--optim", "galore_adamw"], "the method here is 'galore_dominant_adamw'"),
        (["memory", "60m", "--rank", "8", "--optim-args", "rank=4"], "the rank is given twice: --rank 8 and rank=4"),
        (["targets", "some/model"], "Give a folder with its config.json"),
        (["env", "{empty}"], "it is not the output folder of a run"),
        (["env", "{damaged}"], "cannot be read"),
        (["targets", "60m", "--optim-args", "rnak=8"], "no option 'rnak'; did you mean 'rank'"),
        (["targets", "60m", "--optim", "adam"], "unknown method 'adam'"),
        (["targets", "60m", "--optim-args", "rank"], "not of the form option=value"),
        (["targets", "60m", "--target-modules", "nothing"], "matches no trainable matrix"),
        (["targets", "60m", "--optim-args", "rank=4096"], "not below the short side"),
        (["targets", "./no/such/folder"], "no/such/folder"),
        (["targets", "{broken}"], "cannot be read"),
        (["memory", "60m", "--budget", "24"], "write for instance 24GB"),
        (["memory", "60m", "--budget", "much"], "not an amount of memory"),
        (["memory", "60m", "--dtype", "int3"], "dtype must be one of bf16, fp16, fp32"),
        (["memory", "60m", "--batch", "0"], "at least 1"),
        (["report", "{empty}"], "nothing to draw"),
        (["report", "./no/such/run"], "there is no such folder"),
        (["report", "{run}", "--out", "{run}/trainer_state.json"], "trainer_state.json: File exists"),
        (["methods", "--jsn"], "No such option"),
        (["nonsense"], "No such command"),
        (["targets"], "Missing argument"),
    ],
)
def test_a_users_mistake_is_a_sentence_and_exit_code_2(arguments, message, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "hf_lowrank.json").write_text('{"optimizer": "fira_adamw", "groups": [')
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "run" / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 2.0}]}')
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "lla')
    monkeypatch.chdir(tmp_path)
    code, out, err = run(
        *(
            text.format(**{name: tmp_path / name for name in ("broken", "damaged", "empty", "run")})
            for text in arguments
        )
    )
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in out + err
    assert not (tmp_path / "report").exists()  # nothing half-written


@pytest.mark.parametrize("command", ["methods", "targets", "memory", "report", "env"])
def test_help_teaches_by_example(command, run):
    code, out, _ = run(command, "--help")
    assert code == 0 and "Examples:" in out and f"hf-lowrank {command}" in out
    code, out, _ = run("--help")
    assert command in out


def test_env_prints_versions_and_how_a_run_was_set_up(run, tmp_path):
    import torch

    from hf_lowrank import LowRankOptimizer, param_groups
    from hf_lowrank.observe.describe import described

    code, out, _ = run("env", "--json")
    found = json.loads(out)
    assert code == 0 and found["versions"]["torch"] == torch.__version__ and found["devices"][0].startswith("cpu")
    assert {"hf_lowrank", "python", "transformers", "accelerate", "peft", "bitsandbytes", "datasets"} <= set(
        found["versions"]
    )
    model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 16))
    optimizer = LowRankOptimizer(param_groups(model, rank=4, scale=0.5), "fira_adamw_8bit")
    (tmp_path / "hf_lowrank.json").write_text(json.dumps(described(optimizer)))
    _, out, _ = run("env", tmp_path, "--json")
    made = json.loads(out)["run"]
    assert made["method"] == "fira_adamw_8bit" and made["options"]["scale"] == 0.5
    assert {"name": "0", "number": 1, "shape": "24 x 16", "rank": 4} in made["parameters"]
    assert {"name": "0.bias", "number": 1, "shape": "24", "rank": None} in made["parameters"]
    _, out, _ = run("env", tmp_path)
    assert f"torch         {torch.__version__}" in out and "fira_adamw_8bit" in out and "16 x 24" in out


@pytest.mark.processes
@pytest.mark.parametrize(
    "words", [["hf_lowrank", "--help"], ["hf_lowrank", "--version"], ["hf_lowrank.cli", "methods", "--json"]]
)
def test_a_reader_that_leaves_early_is_no_error(words):
    """As `| head` does: here it is gone before the first line, so that even what fits into the pipe fails."""
    running = subprocess.Popen(
        [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    running.stdout.close()
    assert running.stderr.read() == ""
    running.wait(timeout=60)


@pytest.mark.processes
def test_without_a_hub_a_model_by_name_is_answered_within_two_seconds(tmp_path):
    """Of the computer's work, and of waiting for a hub that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        script = (
            "import sys, time; began = time.process_time()\n"
            "from hf_lowrank.planning import hub\n"
            "waited = time.perf_counter()\n"
            "try: hub.check_within_reach('some/model')\n"
            "except ValueError as error: print(error)\n"
            "assert time.perf_counter() - waited < 1.6, time.perf_counter() - waited\n"
            "assert time.process_time() - began < 0.5 and 'torch' not in sys.modules\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert f"{address} does not answer" in done.stdout


def test_a_name_that_is_not_resolved_is_not_waited_for(monkeypatch):
    from hf_lowrank.planning import hub

    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: time.sleep(3) or [])
    began = time.perf_counter()
    assert not hub.answers("https://somewhere.invalid/config.json", 0.1)
    assert time.perf_counter() - began < 2  # of the 3 that the look-up takes


def test_a_model_in_the_cache_of_the_hub_needs_no_hub(run, tmp_path, monkeypatch):
    from hf_lowrank.planning import hub

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ValueError, match="does not answer"):
        hub.check_within_reach("some/model")
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    tiny_config(snapshot)
    hub.check_within_reach("some/model")
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # so that its client does not ask either


def test_without_a_command_there_is_help_and_the_version_is_said(run):
    code, out, err = run()
    assert code == 2 and "Commands" in out + err
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("hf_lowrank ")
