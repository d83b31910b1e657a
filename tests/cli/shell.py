"""Running commands of `unclip` inside the tests' own process."""

import shlex
from pathlib import Path

from unclip_pl.cli import unclip


def run_unclip(command: str, *more: object) -> int:
    """The exit code of a command line, with further words (paths, captions) after it."""
    return unclip.main([*shlex.split(command), *map(str, more)])


def error_of(capsys) -> str:
    """The one line on stderr with which a command refused its input, without the prefix."""
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("unclip: ")]
    assert len(errors) == 1, lines
    return errors[0].removeprefix("unclip: ")


def names_in(folder: Path) -> list[str]:
    """The names of the files in a folder, in order."""
    return sorted(path.name for path in folder.iterdir())
