"""`unclip serve` as a process: it says where it is, answers, and ends cleanly."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from unclip_pl.cli.unclip import main


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_the_package_and_ends_when_it_should(tmp_path, end):
    pytest.importorskip("gradio", reason='needs the extra "web"')
    options = [
        "--port",
        "0",
        "--size",
        "256",
        "--steps",
        "3",
        "--prior-top-p",
        "0.5",
        "--queue",
        "5",
    ]
    code = "import sys; from unclip_pl.cli.unclip import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "serve", *options]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        too_long = threading.Timer(300, process.kill)  # or a server that says nothing hangs this
        too_long.start()
        try:
            line = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert address, line + process.stderr.read()
            with urllib.request.urlopen(f"{address[0]}/api/studio", timeout=30) as answer:
                said = json.load(answer)
            assert said["sizes"] == [64, 256] and said["steps"] == 3 and said["limit"] == 5
            assert said["priors"] == ["diffusion", "ar", "none", "text"]
            process.send_signal(end)
            out, err = process.communicate(timeout=60)
        finally:
            too_long.cancel()
            process.kill()
    assert process.returncode == 0 and "The studio is closed." in out, err
    assert "Traceback" not in err
    assert not list(Path(tmp_path).glob("unclip-studio-*"))


BAD = [
    ("--runs nowhere", "There is no folder nowhere: check --runs."),
    ("--auth nowhere", "The file of users nowhere cannot be read"),
    ("--host 203.0.113.1", "The address 203.0.113.1:7860 cannot be used"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_options_are_refused_in_a_sentence(options, words, capsys):
    pytest.importorskip("gradio", reason='needs the extra "web"')
    assert main(["serve", *options.split()]) == 1
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "unclip_pl.studio.server", raising=False)
    monkeypatch.delattr("unclip_pl.studio.server", raising=False)
    assert main(["serve"]) == 1
    assert "pip install 'unclip_pl[web]'" in capsys.readouterr().err
