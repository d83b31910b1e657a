"""The README's commands name files and options that exist."""

import re
import shlex
from pathlib import Path

import pytest

from unclip_pl.cli.configs import find_config
from unclip_pl.cli.unclip import bind

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
LINES = [
    line.split("  #")[0].split("   ")[0].replace("...", "").strip()
    for block in BLOCKS
    for line in block.splitlines()
]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("lightning ")])
def test_configurations_exist(line):
    words = shlex.split(line)
    files = [words[i + 1] for i, word in enumerate(words) if word == "-c"]
    assert files and all(Path(find_config(str(ROOT / file))).is_file() for file in files)


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("unclip ")])
def test_unclip_commands_parse(line):
    assert bind(shlex.split(line)[1:])


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("make ")])
def test_make_targets_exist(line):
    assert re.search(rf"^{line.split()[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


def test_pictures_exist_and_are_small():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert pictures and all((ROOT / picture).stat().st_size <= 300_000 for picture in pictures)
