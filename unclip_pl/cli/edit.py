"""`unclip edit`: text diffs, pictures changed as two captions differ (unCLIP section 3.3)."""

import argparse
import csv
from pathlib import Path
from typing import NamedTuple

from unclip_pl.cli.options import AddCommand, read_file
from unclip_pl.cli.pictures import PICTURE_HELP, enlarge_like, require_files
from unclip_pl.cli.session import Session, add_session_options
from unclip_pl.utils.errors import UserError

DEFAULT_THETA = "0..0.5"


class Edit(NamedTuple):
    """One picture, and the captions to go from and to."""

    path: Path
    source: str
    target: str


def add(command: AddCommand) -> None:
    parser = command("edit", run, "Change a picture as the difference of two captions says.")
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help=PICTURE_HELP)
    parser.add_argument(
        "--from", dest="source", default="a photo", help='what the picture is; "" leaves it out'
    )
    parser.add_argument("--to", dest="target", help="what it shall be")
    parser.add_argument(
        "--theta",
        type=parse_range,
        nargs="+",
        help="how far to go, 0 to 1: numbers, or a range for five of them; by default "
        f"{DEFAULT_THETA}",
    )
    parser.add_argument(
        "--file",
        type=Path,
        help="a UTF-8 file of edits, one per line: picture, from, to, with tabs between; pictures "
        "are looked for next to the file",
    )
    add_session_options(parser)


def run(arguments: argparse.Namespace) -> None:
    import torch

    from unclip_pl.manipulate import check_theta, text_diff

    edits = [Edit(path, arguments.source, arguments.target) for path in arguments.images]
    if edits and arguments.target is None:
        raise UserError("There is no --to: say what the picture shall be.")
    if arguments.file:
        edits += read_edits(arguments.file)
    check_edits(edits)
    require_files(edit.path for edit in edits)
    ranges = arguments.theta or [parse_range(DEFAULT_THETA)]
    thetas = [value for values in ranges for value in values]
    theta = torch.tensor(thetas)
    check_theta(theta)
    session = Session(arguments)
    paths = dict.fromkeys(edit.path for edit in edits)
    latents = {path: session.load_latent(path) for path in paths}
    rows, labels = [], []
    for number, edit in enumerate(edits):
        original, latent = latents[edit.path]
        sampling = session.inversion_sampling(latent)
        count = len(thetas)
        source = [edit.source] * count if edit.source.strip() else None
        target = [edit.target] * count
        with session.progress(f"{edit.path.name}: {edit.target}") as callback:
            repeated = latent[[0] * count]
            drawn = text_diff(session.unclip, repeated, source, target, theta, sampling, callback)
        drawn = session.upsample_to_size(drawn, [arguments.seed] * count)
        name = edit.path.stem if len(edits) == 1 else f"{number:02d}-{edit.path.stem}"
        settings = f'edit, from "{edit.source}" to "{edit.target}", {sampling}'
        for value, image in zip(thetas, drawn):
            session.save(image, f"{name}-theta{value:g}", source=edit.path.name, unclip=settings)
        rows.append(torch.cat([enlarge_like(original, drawn), drawn]))
        labels.append(f"{edit.source} > {edit.target}" if source else f"> {edit.target}")
    heads = ["original", *(f"theta {value:g}" for value in thetas)]
    session.save_figure("edits", rows, labels, heads)


def parse_range(text: str) -> list[float]:
    """A number, "0.25", as a list of one; a range, "0..0.5", as five numbers from 0 to 0.5."""
    first, dots, last = text.partition("..")
    try:
        start = float(first)
        end = float(last) if dots else start
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is neither a number nor a range: write 0.25 or 0..0.5"
        ) from None
    return [start + (end - start) * k / 4 for k in range(5)] if dots else [start]


def read_edits(file: Path) -> list[Edit]:
    """The edits of a file with lines of picture, from and to, with tabs between.

    Raises:
        UserError: the file cannot be read, or a line has not three parts.
    """
    edits = []
    lines = read_file(file, "edits").splitlines()
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    for number, row in enumerate(rows, start=1):
        if not row:
            continue
        if len(row) != 3:
            raise UserError(
                f"Line {number} of {file} has {len(row)} parts: write picture, from and to with "
                "tabs between."
            )
        picture, source, target = (part.strip() for part in row)
        edits.append(Edit(file.parent / picture, source, target))
    return edits


def check_edits(edits: list[Edit]) -> None:
    """Raise a UserError if there is no edit, or one that goes nowhere."""
    if not edits:
        raise UserError(
            "There is no picture to edit: name one with --from and --to, or a file with one edit "
            "per line (--file)."
        )
    for edit in edits:
        if not edit.target.strip():
            raise UserError(
                f"The caption to go to is empty for {edit.path}: say what the picture shall be."
            )
        if edit.source.strip() == edit.target.strip():
            raise UserError(
                f'From and to are the same for {edit.path} ("{edit.target}"), which is no change: '
                "make them differ."
            )
