"""`unclip generate | vary | edit | upsample | export | data ...`: what is done with trained stages and with data; the commands stand in `commands/`."""

import argparse
import sys

from unclip_pl import __version__
from unclip_pl.commands import data, export, generate, manipulate, probe, upsample
from unclip_pl.commands.common import command_of
from unclip_pl.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The whole command line of `unclip`."""
    root = argparse.ArgumentParser(prog="unclip", description="Draw with unCLIP and look after its data. Training: see `lightning --help`.")
    root.add_argument("--version", action="version", version=f"unclip_pl {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for family in (generate, manipulate, upsample, export):
        family.add(command_of(commands))
    of_data = commands.add_parser("data", help="Draw, check and inspect data.")
    data.add(command_of(of_data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")))
    of_probe = commands.add_parser("probe", help="Look into CLIP's embedding of a picture.")
    probe.add(command_of(of_probe.add_subparsers(dest="probe_command", required=True, metavar="COMMAND")))
    return root


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `unclip`; returns the exit code."""
    parsed = parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"unclip: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"unclip: {error.filename or 'A file'} cannot be used ({error.strerror or error}): check the path and the rights to it.", file=sys.stderr)
        return 1
    return 0
