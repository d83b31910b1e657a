"""Ctrl-C ends a command with one line and code 130, whatever it does at that moment."""

import os
import signal
import subprocess
import sys

import pytest

from tests.cli.shell import error_of, run_unclip
from tests.training.toy import ToyRows, command
from unclip_pl.cli import lightning, unclip
from unclip_pl.utils import interrupts
from unclip_pl.utils.commands import exit_code


def press(*_: object) -> None:
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def press_swallowed() -> None:
    """Ctrl-C in an import that goes on without what was cut off."""
    try:
        press()
    except KeyboardInterrupt:
        raise RecursionError("numpy.dtypes") from None


@pytest.mark.parametrize("run", [press, press_swallowed])
def test_a_command_that_is_interrupted_says_so(run, capsys):
    before = signal.getsignal(signal.SIGINT)
    assert exit_code("python -m eval.fid", run) == 130
    assert capsys.readouterr().err == "python -m eval.fid: interrupted.\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_unclip_is_interrupted(monkeypatch, capsys):
    monkeypatch.setattr(unclip, "run", press)
    assert run_unclip("generate fox") == 130
    assert error_of(capsys) == "interrupted."


def test_the_preparation_of_data_is_interrupted(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr(ToyRows, "prepare_data", press)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert lightning.main(command(tmp_path)) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning lets it be ignored
    assert capsys.readouterr().err.splitlines()[-1] == "lightning: interrupted."
    assert "Detected" not in caplog.text


@pytest.mark.parametrize("module", ["eval.fid", "unclip_pl"])
def test_imports_are_interrupted(module, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import signal, sys\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        "        if name in ('torch', 'jsonargparse', 'unclip_pl.data.names'):\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    paths = [str(tmp_path), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGINT  # a shell says 130
    assert done.stderr == f"python -m {module}: interrupted.\n"


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["python", "/bin/unclip", "generate", "fox"], "unclip"),
        (["python", "-u", "-m", "eval.fid", "--images", "x"], "python -m eval.fid"),
        (["python", "-m", "pytest", "-q"], None),
        (["python", "mine.py"], None),
        (["python"], None),
    ],
)
def test_only_our_commands_are_quiet(words, name, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", words)
    first = 3 if "-u" in words else 2 if "-m" in words else 1
    monkeypatch.setattr(sys, "argv", words[first:] or [""])
    assert interrupts.program() == name
