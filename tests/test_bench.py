"""The benchmarks run, and print every row and every target."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lowrank import METHODS


RUN = Path(__file__).parents[1] / "recipes" / "benchmarks" / "run.py"


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(RUN), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.processes
def test_quick_mode_prints_every_section(tmp_path):
    file = tmp_path / "results.json"
    sections = "steps,bytes,refresh,stagger,training,subtrack"
    done = run("--quick", "--threads", 1, "--dtypes", "float32", "--sections", sections, "--json", file)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(file.read_text())
    steps, *others = results["sections"]
    rows = {row["optimizer"]: row for row in steps["rows"]}
    for name in ("galore_dominant_adamw", "galore_i3s_adamw", "fira_adamw", "torch AdamW (fused)"):
        assert rows[name]["ordinary ms"] > 0 and rows[name]["state MiB"] > 0
    assert rows["torch AdamW (fused)"]["peak MiB"] == 0  # in place: the clock of memory does not count what was there
    noted = "\n".join(steps["remarks"])
    for peer in ("galore-torch", "fira", "apollo-torch", "q-galore-torch", "pytorch-optimizer", "bitsandbytes"):
        assert any(name.startswith(peer) for name in rows) or peer in noted, peer  # measured, or it says why not
    titles = " ".join(section["title"] for section in others)
    for words in (
        "optimizer state",
        "Refresh of",
        "Captured energy",
        "Worst step",
        "End to end",
        "1000 optimizer steps",
    ):
        assert words in titles
    state = next(section for section in others if "optimizer state" in section["title"])
    assert {row["optimizer"] for row in state["rows"]} >= set(METHODS)
    for target in results["targets"]:
        assert target["verdict"] in ("met", "NOT MET", "printed", "not measured")
        assert target["what"] in done.stdout
    assert len(results["targets"]) > 25
    assert results["setting"]["threads"] == 1 and results["setting"]["versions"]["torch"]


@pytest.mark.full
@pytest.mark.processes
def test_the_refresh_is_shared_out(tmp_path):
    file = tmp_path / "results.json"
    done = run("--quick", "--threads", 1, "--sections", "distributed", "--json", file)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = json.loads(file.read_text())["sections"][0]["rows"]
    assert one["share of the work, counted"] == "1.000"
    assert two["share of the work, counted"] == "0.500, 0.500"  # four layers of equal shapes split evenly


@pytest.mark.processes
def test_state_is_shared_out(tmp_path):
    file = tmp_path / "results.json"
    done = run("--quick", "--threads", 1, "--sections", "sharded", "--json", file)
    assert done.returncode == 0, done.stderr[-2000:]
    plain, sharded = json.loads(file.read_text())["sections"][0]["rows"]
    (whole, same), (one, other) = ([float(x) for x in row["MiB of state"].split(", ")] for row in (plain, sharded))
    assert whole == same and abs(one + other - whole) < 0.2 and max(one, other) < 0.55 * whole + 0.1  # rounded to 0.1


@pytest.mark.processes
def test_mistakes_are_named():
    done = run("--sizes", "61m")
    assert done.returncode == 2
    assert "unknown 61m; valid: 9m, 60m, 130m, 350m" in done.stderr


def test_the_script_for_a_gpu_runs_every_section_that_needs_no_time(tmp_path):
    script = RUN.with_name("gpu.py")
    sections = ["kernels", "refresh", "steps", "ahead", "memory"]
    command = [sys.executable, str(script), "--out", str(tmp_path), "--device", "cpu", "--quick"]
    done = subprocess.run([*command, "--sections", ",".join(sections)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in sections:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert "error" not in found, found["error"]
        assert found["device"] == "cpu"
    refresh = json.loads((tmp_path / "refresh.json").read_text())["results"]["64 x 96"]
    assert refresh["gram"]["worst cosine"] > 0.999


@pytest.mark.processes
def test_two_versions_take_turns(tmp_path):
    """A checkout beside itself; one that has no such method says which."""
    command = [
        sys.executable,
        RUN.with_name("versions.py"),
        "--before",
        RUN.parents[2],
        "--sizes",
        "9m",
        "--rounds",
        "2",
    ]
    command += ["--seconds", "0.01", "--names"]
    done = subprocess.run([*command, "galore_i3s_adamw"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    row = done.stdout.splitlines()[-1].split("|")
    assert row[3].strip() == "`galore_i3s_adamw`" and float(row[4]) > 0 and float(row[5]) > 0
    (tmp_path / "hf_lowrank").mkdir()
    (tmp_path / "hf_lowrank" / "__init__.py").touch()
    command[3] = tmp_path
    done = subprocess.run([*command, "galore_i3s_adamw"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and f"galore_i3s_adamw does not run in {tmp_path}" in done.stderr
