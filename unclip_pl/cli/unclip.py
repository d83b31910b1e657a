"""The command `unclip`: draw with trained stages, and look after data and cluster jobs."""

import difflib
import functools
import inspect
import io
import os
import sys
import textwrap
from collections.abc import Sequence

from unclip_pl import __version__
from unclip_pl.cli import (
    data,
    edit,
    export,
    generate,
    import_weights,
    inpaint,
    interpolate,
    invert,
    plan,
    probe,
    serve,
    submit,
    upsample,
    vary,
)
from unclip_pl.utils.commands import Command, CommandParser, UsageError, exit_code

COMMANDS: dict[str, Command] = {
    "generate": generate.generate,
    "invert": invert.invert,
    "vary": vary.vary,
    "interpolate": interpolate.interpolate,
    "edit": edit.edit,
    "inpaint": inpaint.inpaint,
    "upsample": upsample.upsample,
    "serve": serve.serve,
    "export": export.export,
    "plan": plan.plan,
    "submit": submit.submit,
    "import karlo": import_weights.karlo,
    "import kandinsky-prior": import_weights.kandinsky_prior,
    "import glide": import_weights.glide,
    "data openmoji": data.openmoji,
    "data verify": data.verify,
    "data import": data.import_,
    "probe pca": probe.pca,
    "probe typographic": probe.typographic,
}
GROUPS = {
    "": "Draw with unCLIP and look after its data. Training: see `lightning --help`.",
    "import": "Make releases of other projects' weights.",
    "data": "Draw, check and import data.",
    "probe": "Look into CLIP's embedding of a picture.",
}


def bind(words: Sequence[str]) -> functools.partial:
    """The function of a command line with its arguments.

    Raises:
        UsageError: there is no such command, or its options are wrong.
    """
    name = " ".join(words[: 2 if words[0] in GROUPS else 1])
    if name not in COMMANDS:
        similar = difflib.get_close_matches(name, [*COMMANDS, *GROUPS], 1, 0.6)
        hint = f": did you mean {similar[0]}?" if similar else "; `unclip --help` lists them all."
        raise UsageError(f"There is no command {name}{hint}")
    return CommandParser(COMMANDS[name], f"unclip {name}").bind(words[len(name.split()) :])


def help_page(group: str) -> str:
    """What a group of commands, or "" for `unclip` itself, shows for --help."""
    program = f"unclip {group}".strip()
    rows = {}
    for name, command in COMMANDS.items():
        first, _, second = name.partition(" ")
        if group and first == group:
            rows[second] = (inspect.getdoc(command) or "").splitlines()[0]
        elif not group:
            rows[first] = GROUPS.get(first) or (inspect.getdoc(command) or "").splitlines()[0]
    width = max(map(len, rows)) + 4
    lines = [f"usage: {program} COMMAND ...", "", GROUPS[group], ""]
    for name, text in rows.items():
        gap = " " * width
        lines += textwrap.wrap(
            text, 98, initial_indent=f"  {name}".ljust(width), subsequent_indent=gap
        )
    return "\n".join([*lines, "", f"`{program} COMMAND --help` shows the options of a command."])


def run(words: Sequence[str]) -> None:
    """Carry out a command line, or show a page of help."""
    group = words[0] if words and words[0] in GROUPS else ""
    rest = words[1:] if group else words
    if rest == ["--version"]:
        print(f"unclip_pl {__version__}")
    elif rest and rest[0] not in ("-h", "--help"):
        bind(words)()
    else:
        print(help_page(group))
        if not rest:
            raise UsageError("Which command? They are listed above.")


def main(words: list[str] | None = None) -> int:
    """Entry point of `unclip`; returns the exit code."""
    # Before torch is imported: waiting threads sleep soon (docs/cluster.md, "CPUs").
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for stream in (sys.stdout, sys.stderr):  # do not fail on names that it cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return exit_code("unclip", lambda: run(sys.argv[1:] if words is None else words))
