"""The launcher answers a misspelt --optim with the nearest name, instead of a list of all of them."""

import argparse
import sys

import pytest

from hf_lowrank import __main__ as launcher


SCRIPTS = {
    "from the command line": (
        "from transformers import HfArgumentParser, TrainingArguments\n"
        "HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()\n"
    ),
    "in the script": (
        "import sys\nfrom transformers import TrainingArguments\n"
        "TrainingArguments('out', optim=sys.argv[-1], use_cpu=True, report_to='none')\n"
    ),
}


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """Run a script, of SCRIPTS or its text, with --optim NAME; return (exit code, stderr)."""

    def call(script, name):
        (tmp_path / "script.py").write_text(SCRIPTS.get(script, script))
        argv = ["hf_lowrank", str(tmp_path / "script.py"), "--output_dir", str(tmp_path), "--optim", name]
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(argparse.ArgumentParser, "error", argparse.ArgumentParser.error)
        with pytest.raises(SystemExit) as ended:
            launcher.main()
        return ended.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("galor_i3s_adamw", "galore_i3s_adamw"),
        ("galore_adamw_i3s", "galore_i3s_adamw"),
        ("fira_i3s_8bit", "fira_i3s_adamw_8bit"),
        ("adamw_troch", "adamw_torch"),  # transformers' own
    ],
)
def test_the_nearest_name_and_no_list(script, given, meant, launch):
    code, said = launch(script, given)
    (line,) = [line for line in said.splitlines() if given in line]
    assert code == 2 and line.endswith(f"--optim: there is no optimizer '{given}'; did you mean '{meant}'?")
    assert "choose from" not in said and "usage:" not in said


def test_a_name_like_none_says_where_the_names_are(launch):
    code, said = launch("from the command line", "zzzz")
    assert code == 2 and "there is no optimizer 'zzzz'; python -m hf_lowrank --help lists ours" in said


def test_other_mistakes_are_left_to_the_scripts_parser(launch):
    script = "import argparse\nargparse.ArgumentParser().parse_args(['--wrong'])\n"
    code, said = launch(script, "galore_i3s_adamw")
    assert code == 2 and "usage:" in said and "unrecognized arguments: --wrong" in said
