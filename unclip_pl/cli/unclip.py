"""The command `unclip`: draw with trained stages, and look after data and cluster jobs."""

import argparse
import io
import os
import sys

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
from unclip_pl.cli.options import command_adder
from unclip_pl.utils.errors import UserError

COMMANDS = (
    generate, invert, vary, interpolate, edit, inpaint, upsample, serve, export, plan, submit
)  # fmt: skip
GROUPS = {
    "import": (import_weights, "Make releases of other projects' weights."),
    "data": (data, "Draw, check and import data."),
    "probe": (probe, "Look into CLIP's embedding of a picture."),
}


def parser() -> argparse.ArgumentParser:
    """The whole command line of `unclip`."""
    root = argparse.ArgumentParser(
        prog="unclip",
        description="Draw with unCLIP and look after its data. Training: see `lightning --help`.",
    )
    root.add_argument("--version", action="version", version=f"unclip_pl {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(command_adder(commands))
    for name, (module, help) in GROUPS.items():
        group = commands.add_parser(name, help=help, description=help)
        subcommands = group.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
        module.add(command_adder(subcommands))
    return root


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `unclip`; returns the exit code."""
    # Before torch is imported: waiting threads sleep soon (docs/cluster.md, "CPUs").
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for stream in (sys.stdout, sys.stderr):  # do not fail on names that it cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    root = parser()
    parsed, flags = root.parse_known_args(arguments)
    if flags and not hasattr(parsed, "flags"):  # only commands that pass flags on have it
        root.error(f"unrecognized arguments: {' '.join(flags)}")
    parsed.flags = flags
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"unclip: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        file, reason = error.filename or "A file", error.strerror or error
        print(
            f"unclip: {file} cannot be used ({reason}): check the path and the rights to it.",
            file=sys.stderr,
        )
        return 1
    return 0
