"""The command `unclip`: what is done with trained stages, data and clusters; the subcommands stand in `commands/`."""

import argparse
import io
import os
import sys

from unclip_pl import __version__
from unclip_pl.cli import data, export, generate, manipulate, plan, probe, submit, upsample
from unclip_pl.cli.options import command_of
from unclip_pl.utils.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The whole command line of `unclip`."""
    root = argparse.ArgumentParser(
        prog="unclip",
        description="Draw with unCLIP and look after its data. Training: see `lightning --help`.",
    )
    root.add_argument("--version", action="version", version=f"unclip_pl {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for family in (generate, manipulate, upsample, export, plan, submit):
        family.add(command_of(commands))
    of_data = commands.add_parser("data", help="Draw, check and inspect data.")
    data.add(
        command_of(of_data.add_subparsers(dest="data_command", required=True, metavar="COMMAND"))
    )
    of_probe = commands.add_parser("probe", help="Look into CLIP's embedding of a picture.")
    probe.add(
        command_of(of_probe.add_subparsers(dest="probe_command", required=True, metavar="COMMAND"))
    )
    return root


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `unclip`; returns the exit code."""
    # Before torch is imported: threads soon sleep while they wait (docs/cluster.md, "CPUs").
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for stream in (sys.stdout, sys.stderr):  # a name that it cannot show is no reason to stop
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    root = parser()
    parsed, flags = root.parse_known_args(arguments)
    if flags and not hasattr(parsed, "flags"):  # a command that passes flags on has this default
        root.error(f"unrecognized arguments: {' '.join(flags)}")
    parsed.flags = flags
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"unclip: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"unclip: {error.filename or 'A file'} cannot be used ({error.strerror or error}): check the path and the rights to it.",
            file=sys.stderr,
        )
        return 1
    return 0
